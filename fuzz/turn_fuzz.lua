--- Reads random soups of tags, cut at random, as turns of an assistant.
---
---   lua5.4 fuzz/turn_fuzz.lua [SECONDS [SEED]]     from the root of the source tree, after a build
---
--- However a text is cut, the parts say the same; nothing raises; calls come with increasing
--- indices and arguments that are objects; grown arguments are those of the call. Prints the text
--- and exits 1 where that does not hold.

package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
package.cpath = "./build/?.so;" .. package.cpath

local json = require "moonlet.json"
local turn = require "moonlet.turn"

local PIECES <const> = { "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>",
  "<function=g>", "<function=unknown>", "</function>", "<parameter=a>", "<parameter=b>",
  "<parameter=c>", "<parameter=unknown>", "</parameter>", "< parameter = a >", "<function=",
  "<parameter=", "</", "<", ">", "=", "{", "}", '{"name": "f", "arguments": ', '{"a": 1}', "\"",
  "'", "\\", "\\u00e9", "true", "None", "12", "-3.5e7", "[1, 2", "]", ",", ":", "\n", "\n\n", " ",
  "word", "é", "🙂", "\xff", "\xe2\x82", "\0", "<|im_end|>", "<tool_", "call>", "```", "<b>" }
local CALL <const> = { "<tool_call>\n", "<function=f>\n", "<parameter=a>\n", "1",
  "\n</parameter>\n", "<parameter=b>\n", "x", "\n</parameter>\n", "</function>\n", "</tool_call>" }

local TOOLS <const> = {
  { type = "function", ["function"] = { name = "f", parameters = { type = "object", properties = {
    a = { type = "integer" }, b = { type = "string" }, c = { type = "array" } } } } },
  { name = "g", parameters = { type = "object", properties = { a = { type = "object" },
    b = { anyOf = { { type = "null" }, { type = "boolean" } } } } } },
}

-- Names about as long as a tag may be, some of them cut short by the next tag.
local function long_name()
  return ("<function=%s%s"):format(("f"):rep(math.random(240, 260)), math.random(2) == 1 and ">"
    or "")
end

local function soup()
  local list = {}
  for _ = 1, math.random(0, 30) do
    if math.random(20) == 1 then
      list[#list + 1] = long_name()
    elseif math.random(4) == 1 then
      -- A call of which some is missing.
      for _, piece in ipairs(CALL) do
        if math.random(6) > 1 then list[#list + 1] = piece end
      end
    else
      list[#list + 1] = PIECES[math.random(#PIECES)]
    end
  end
  return table.concat(list)
end

-- What parts say: neighbours of one kind joined, calls without their ids.
local function merged(parts)
  local out = {}
  for _, part in ipairs(parts) do
    local last = out[#out]
    if part.kind == "call" then
      out[#out + 1] = { "call", json.encode { part.index, part.name, part.arguments, part.text } }
    elseif last and last[1] == part.kind and last.index == part.index then
      last[2] = last[2] .. part.text
    else
      out[#out + 1] = { part.kind, part.text or part.name, index = part.index }
    end
  end
  for i, item in ipairs(out) do out[i] = item[1] .. " " .. item[2] end
  return table.concat(out, "\n")
end

local function read(text, options, reason, longest)
  local reader, parts, at = turn.reader(options), {}, 1
  while at <= #text do
    local n = math.random(1, longest)
    for _, part in ipairs(reader:feed(text:sub(at, at + n - 1))) do parts[#parts + 1] = part end
    at = at + n
  end
  for _, part in ipairs(reader:finish(reason)) do parts[#parts + 1] = part end
  return parts
end

local function check_calls(parts)
  local n, grown = 0, {}
  for _, part in ipairs(parts) do
    if part.kind == "call_arguments" then
      grown[part.index] = (grown[part.index] or "") .. part.text
    elseif part.kind == "call" then
      assert(part.index == n and json.is_object(part.arguments), "calls out of order")
      n = n + 1
      local all = grown[part.index]
      assert(not all or json.encode(assert(json.decode(all)), { sort_keys = true })
        == json.encode(part.arguments, { sort_keys = true }), "grown arguments differ")
    end
  end
end

local function try(text, options, reason)
  local whole = read(text, options, reason, math.max(1, #text) << 20)
  check_calls(whole)
  local expected = merged(whole)
  for _, longest in ipairs { 1, 2, 9, 40 } do
    local parts = read(text, options, reason, longest)
    check_calls(parts)
    if merged(parts) ~= expected then
      error(("cut differently:\n%s\n-- instead of\n%s"):format(merged(parts), expected), 0)
    end
  end
end

local seconds, seed = tonumber(arg[1] or 10), tonumber(arg[2] or 1)
math.randomseed(seed)
local count = 0
while os.clock() < seconds do
  count = count + 1
  local text = soup()
  local options = { tools = math.random(3) > 1 and TOOLS or nil, reasoning = math.random(2) == 1,
    calls = math.random(5) > 1, parallel = math.random(5) > 1,
    stream_arguments = math.random(2) == 1 }
  local reason = math.random(3) == 1 and "length" or "stop"
  local ok, problem = xpcall(try, debug.traceback, text, options, reason)
  if not ok then
    options.tools = options.tools and "all"
    io.stderr:write(("seed %d, round %d: %s\n%s\n%s %s\n"):format(seed, count, problem,
      json.encode(text), json.encode(options), reason))
    os.exit(1)
  end
end
print(("%d texts, seed %d: nothing found"):format(count, seed))
