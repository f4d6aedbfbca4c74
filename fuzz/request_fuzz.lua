--- Sends mutated requests to a server with scripted answers, past the sockets.
---
---   lua5.4 fuzz/request_fuzz.lua [SECONDS [SEED]]  from the root of the source tree, after a build
---
--- Every reply must be as /openapi.json describes it, and none may be a failure of the server.
--- Prints the request and exits 1 where that does not hold.

package.path = "./lua/?.lua;./lua/?/init.lua;./?.lua;" .. package.path
package.cpath = "./build/?.so;" .. package.cpath

local direct = require "spec.support.direct"
local json = require "moonlet.json"
local openapi = require "moonlet.server.openapi"
local served = require "spec.support.served"

local ANSWERS <const> = { "Hello.", "I think.</think>\n\nYes.",
  "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
  { text = "cut <tool_call>\n<function=f>\n<parameter=x>", finish_reason = "length" } }

-- ---- requests ----------------------------------------------------------------------------------

local TEXTS <const> = { "", "x", "user", "auto", "json_object", "\0", "\u{10FFFD}\u{100001}",
  "<|im_end|>", "<think>", "<tool_call>", ("a"):rep(3000), "日本", "{", '{"x": 1}', '{"x": ' }
local LEAVES <const> = { json.null, true, false, 0, 1, -1, 2, 17, 1.5, 1e300, -1e300,
  math.maxinteger, math.mininteger, json.array {}, json.object {}, "x" }

local SCHEMAS

-- A value of a schema, for most part.
local function value_of(schema, depth)
  if depth > 6 or depth > 0 and math.random(80) == 1 then return LEAVES[math.random(#LEAVES)] end
  if schema["$ref"] then return value_of(SCHEMAS[schema["$ref"]:match("[^/]+$")], depth) end
  if schema.anyOf then return value_of(schema.anyOf[math.random(#schema.anyOf)], depth) end
  if schema.enum then return schema.enum[math.random(#schema.enum)] end
  local kind = type(schema.type) == "table" and schema.type[math.random(#schema.type)]
    or schema.type
  if kind == "array" then
    local list = json.array {}
    for i = 1, math.random(0, 3) do list[i] = value_of(schema.items or {}, depth + 1) end
    return list
  elseif kind == "object" then
    local object = json.object {}
    for _, name in ipairs(json.keys(schema.properties or {})) do
      local needed = depth == 0 and 16 or 2
      for _, other in ipairs(schema.required or {}) do
        if other == name then needed = 0 end
      end
      if needed == 0 or math.random(needed) == 1 then
        object[name] = value_of(schema.properties[name], depth + 1)
      end
    end
    if math.random(4) == 1 then object.more = LEAVES[math.random(#LEAVES)] end
    return object
  elseif kind == "integer" then
    return math.random(schema.minimum or -2, schema.maximum or 40)
  elseif kind == "number" then
    return (schema.minimum or 0) + math.random() * 2
  elseif kind == "boolean" then
    return math.random(2) == 1
  end
  return TEXTS[math.random(#TEXTS)]
end

-- Bytes of a text changed, now and then.
local function damage(text)
  if math.random(10) > 1 then return text end
  for _ = 1, math.random(1, 4) do
    local at = math.random(1, math.max(1, #text))
    local pieces = { "", string.char(math.random(0, 255)), "[", "{", '"', ",", "1e999", "\\u", "]" }
    text = text:sub(1, at - 1) .. pieces[math.random(#pieces)] .. text:sub(at + 1)
  end
  return text
end

local HOSTS <const> = { "localhost", "localhost", "127.0.0.1:80", "[::1]:80", "evil.example", "",
  "[", "localhost:x", "a@b" }
local ORIGINS <const> = { false, "http://localhost", "null", "http://evil.example", "http://" }
local KINDS <const> = { false, "application/json", "application/json; charset=utf-8",
  "text/plain" }
local METHODS <const> = { "POST", "POST", "POST", "POST", "GET", "HEAD", "OPTIONS", "PUT", "" }

local function pick(list) return list[math.random(#list)] end

local function random_request(document, paths)
  local path = pick(paths)
  local post = document.paths[path].post
  local schema = post and post.requestBody.content["application/json"].schema
  local mostly = math.random(10) > 1
  return { method = mostly and (schema and "POST" or "GET") or pick(METHODS),
    target = path:gsub("{%w+}", pick { "demo-model", "x", "%%00", "%%2e%%2e" })
      .. pick { "", "", "?a=b", "/", "%", "#" },
    body = schema and damage(json.encode(value_of(schema, 0))) or "",
    fields = { host = mostly and "localhost" or pick(HOSTS),
      origin = not mostly and pick(ORIGINS) or nil,
      ["content-type"] = mostly and "application/json" or pick(KINDS) or nil } }
end

local function try(server, document, given)
  local reply = direct.ask(server, document, given)
  assert(reply.status < 500, "status " .. reply.status)
end

-- ---- the loop ----------------------------------------------------------------------------------

local seconds, seed = tonumber(arg[1] or 10), tonumber(arg[2] or 1)
math.randomseed(seed)
local logged
local server <close> = served.replay(ANSWERS, { ctx = 512,
  log = function(text) logged = text end })
local document = openapi.document(server.limits, false)
SCHEMAS = document.components.schemas
local paths = json.keys(document.paths)
local count, failed = 0, false

server.loop:spawn(function()
  while os.clock() < seconds and not failed do
    count = count + 1
    local given = random_request(document, paths)
    local ok, problem = xpcall(try, debug.traceback, server, document, given)
    if not ok or logged then
      io.stderr:write(("seed %d, round %d: %s\n%s\n"):format(seed, count, logged or problem,
        json.encode(given)))
      failed = true
    end
  end
  server.loop:stop()
end)
assert(server.loop:run())
if failed then os.exit(1, true) end
print(("%d requests, seed %d: nothing found"):format(count, seed))
