-- Where the rules come from: vLLM's qwen3_coder and hermes parsers, and failures of real servers
-- with Qwen3.x (issues of vllm, llama.cpp, qwen-code, opencode) named at the cases.

local json = require "moonlet.json"
local turn = require "moonlet.turn"

local function tool(name, properties, extra)
  local parameters = { type = "object", properties = properties }
  for k, v in pairs(extra or {}) do parameters[k] = v end
  return { type = "function", ["function"] = { name = name, parameters = parameters } }
end

local TOOLS = {
  tool("write", { path = { type = "string" }, content = { type = "string" } }),
  tool("bash", { command = { type = "string" }, timeout = { type = "number" } }),
  tool("edit", { path = { type = "string" }, edits = { type = "array", items = {
    type = "object", properties = { oldText = { type = "string" }, newText = { type = "string" },
      line = { type = "integer" } } } } }),
  tool("now", {}),
  tool("pick", { n = { type = "integer" }, flag = { type = "boolean" },
    maybe = { type = { "integer", "null" } }, any = { anyOf = { { type = "number" },
      { type = "array" } } }, options = { type = "object" } }),
}

local function call(name, arguments)
  local lines = { "<tool_call>\n<function=" .. name .. ">" }
  for _, pair in ipairs(arguments) do
    lines[#lines + 1] = ("<parameter=%s>\n%s\n</parameter>"):format(pair[1], pair[2])
  end
  lines[#lines + 1] = "</function>\n</tool_call>"
  return table.concat(lines, "\n")
end

-- Everything a list of parts says, with neighbours of one kind joined.
local function merged(parts)
  local out = {}
  for _, part in ipairs(parts) do
    local last = out[#out]
    if part.kind == "call" then
      out[#out + 1] = ("call %d %s %s | %s"):format(part.index, part.name,
        json.encode(part.arguments), part.text)
    elseif last and last:sub(1, #part.kind + 1) == part.kind .. " " then
      out[#out] = last .. part.text
    else
      out[#out + 1] = part.kind .. " " .. (part.text or part.name)
    end
  end
  return out
end

local function read(text, options, reason, cut)
  local reader, parts = turn.reader(options), {}
  local at = 1
  while at <= #text do
    local n = cut(at)
    for _, part in ipairs(reader:feed(text:sub(at, at + n - 1))) do parts[#parts + 1] = part end
    at = at + n
  end
  for _, part in ipairs(reader:finish(reason)) do parts[#parts + 1] = part end
  return merged(parts)
end

local state = 7
local function random(n)
  state = (state * 1103515245 + 12345) % 2147483648
  return state // 65536 % n + 1
end

-- The turn, after checking that no cut of the text changes it.
local function reads(text, options, reason)
  options = options or { tools = TOOLS }
  local whole = read(text, options, reason, function() return #text end)
  assert.same(whole, read(text, options, reason, function() return 1 end), "one byte at a time")
  for _ = 1, 10 do
    assert.same(whole, read(text, options, reason, function() return random(9) end), "random cuts")
  end
  return turn.read(text, options, reason)
end

local THINKING = { tools = TOOLS, reasoning = true }

describe("turn: reasoning and content", function()
  it("splits at the closing tag and trims between", function()
    local t = reads("Hm, 2+2.\n</think>\n\nIt is 4.\n", THINKING)
    assert.same({ "Hm, 2+2.", "It is 4.\n" }, { t.reasoning, t.content })
  end)

  it("drops a think tag that the prompt has opened already", function()
    local t = reads("<think>\nHm.\n</think>\nYes", THINKING)
    assert.same({ "Hm.", "Yes" }, { t.reasoning, t.content })
  end)

  it("takes a think block although none was expected", function()
    local t = reads("<think>\nHm.</think>Yes", { tools = TOOLS })
    assert.same({ "Hm.", "Yes" }, { t.reasoning, t.content })
  end)

  it("takes everything for reasoning when it was cut off there", function()
    local t = reads("Hm, and then", THINKING, "length")
    assert.equal("Hm, and then", t.reasoning)
    assert.is_nil(t.content)
  end)

  it("takes everything for content without reasoning", function()
    local t = reads("Plain text with a < b and <b>bold</b> <thin", { tools = TOOLS })
    assert.equal("Plain text with a < b and <b>bold</b> <thin", t.content)
    assert.is_nil(t.reasoning)
  end)

  it("drops a second closing tag", function()
    assert.equal("A B", reads("x</think>A </think>B", THINKING).content)
  end)

  it("keeps white space within content and at its end", function()
    assert.equal("a \n\n b\n ", reads("a \n\n b\n ", { tools = TOOLS }).content)
  end)
end)

describe("turn: calls", function()
  it("reads a call with typed arguments in order", function()
    local t = reads(call("pick", { { "n", "3" }, { "flag", "True" }, { "maybe", "None" },
      { "any", "[1, 2]" }, { "options", "{'a': True}" } }))
    assert.equal('{"n": 3, "flag": true, "maybe": null, "any": [1, 2], "options": {"a": true}}',
      json.encode(t.calls[1].arguments))
    assert.is_nil(t.content)
    assert.matches("^call_%x+$", t.calls[1].id)
  end)

  it("keeps strings verbatim but for one line feed at each end", function()
    for _, value in ipairs { "null", "123", "true", "  lead", "\nblank\n", "", '{"a": 1}',
      "ünïcode \240\159\146\150", "a\r\nb" } do
      local t = reads(call("write", { { "path", "x" }, { "content", value } }))
      assert.equal(value, t.calls[1].arguments.content)
    end
  end)

  it("gives an empty object to a call without parameters", function()
    local t = reads("<tool_call>\n<function=now>\n</function>\n</tool_call>")
    assert.equal("{}", json.encode(t.calls[1].arguments))
  end)

  it("reads several calls and the text before and behind", function()
    local t = reads("Let me see.\n\n" .. call("now", {}) .. "\n" .. call("bash",
      { { "command", "ls" } }) .. "\nDone.")
    assert.equal(2, #t.calls)
    assert.equal(1, t.calls[2].index)
    assert.equal("Let me see.Done.", t.content)
  end)

  it("keeps the first call only when parallel calls are off", function()
    local t = reads(call("now", {}) .. call("bash", { { "command", "ls" } }),
      { tools = TOOLS, parallel = false })
    assert.equal(1, #t.calls)
  end)

  it("leaves calls in the content when asked to", function()
    local text = call("now", {})
    local t = reads(text, { tools = TOOLS, calls = false })
    assert.same({ text, 0 }, { t.content, #t.calls })
  end)

  it("tells what the model wrote for each call", function()
    local text = call("bash", { { "command", "ls\n-l" } })
    assert.equal(text, reads(text).calls[1].text)
  end)

  it("reads arrays of objects, members typed by the schema (llama.cpp 21771)", function()
    local value = '[{"oldText": "1", "newText": "b", "line": "12"}]'
    local t = reads(call("edit", { { "path", "f" }, { "edits", value } }))
    assert.equal('[{"oldText": "1", "newText": "b", "line": 12}]',
      json.encode(t.calls[1].arguments.edits))
    t = reads(call("edit", { { "path", "f" }, { "edits", json.encode(value) } })) -- vllm 43238
    assert.equal(12, t.calls[1].arguments.edits[1].line)
  end)

  it("ends reasoning at a call (qwen-code 3730, vllm 39056)", function()
    local t = reads("I should look.\n" .. call("now", {}), THINKING)
    assert.equal("I should look.", t.reasoning)
    assert.equal("now", t.calls[1].name)
  end)

  it("does not end reasoning where the tag is only mentioned", function()
    local t = reads("I could use <tool_call> here, or <function=now> not.</think>No.", THINKING)
    assert.equal("I could use <tool_call> here, or <function=now> not.", t.reasoning)
    assert.same({ "No.", 0 }, { t.content, #t.calls })
  end)

  it("types nothing when the tool is unknown", function()
    local t = reads(call("other", { { "n", "3" } }))
    assert.equal("3", t.calls[1].arguments.n)
  end)

  it("lets the last of two parameters with one name count", function()
    local t = reads(call("bash", { { "command", "a" }, { "timeout", "1" }, { "command", "b" } }))
    assert.equal('{"timeout": 1, "command": "b"}', json.encode(t.calls[1].arguments))
  end)
end)

describe("turn: damaged calls (llama.cpp 24807, 26763, 22878)", function()
  local expected = '{"path": "a", "content": "b"}'

  local function damaged(text)
    local t = reads(text)
    assert.equal(expected, json.encode(t.calls[1] and t.calls[1].arguments or {}))
    return t
  end

  it("white space in tags, values on the tag's line", function()
    damaged("<tool_call><function = write><parameter = path>a</parameter>"
      .. "< parameter=content >b</ parameter></function></tool_call>")
  end)

  it("no closing tag of a parameter", function()
    damaged("<tool_call>\n<function=write>\n<parameter=path>\na\n<parameter=content>\nb\n"
      .. "</function>\n</tool_call>")
  end)

  it("a closing tag of a parameter twice", function()
    damaged("<tool_call>\n<function=write>\n<parameter=path>\na\n</parameter>\n</parameter>\n"
      .. "<parameter=content>\nb\n</parameter>\n</function>\n</tool_call>")
  end)

  it("no closing tag of the function, of the call, of both", function()
    local open = "<tool_call>\n<function=write>\n<parameter=path>\na\n</parameter>\n"
      .. "<parameter=content>\nb\n</parameter>\n"
    damaged(open .. "</tool_call>")
    damaged(open .. "</function>")
    damaged(open)
    damaged(open .. "</function>" .. call("now", {}))
    damaged(open .. call("now", {}))
    assert.equal(2, #damaged(open .. "<function=now>\n</function>").calls)
  end)

  it("no opening tag of the call, for a tool there is", function()
    damaged("<function=write>\n<parameter=path>\na\n</parameter>\n<parameter=content>\nb\n"
      .. "</parameter>\n</function>\n</tool_call>")
    local text = "<function=else>\n<parameter=x>\n1\n</parameter>\n</function>"
    assert.same({ text, 0 }, { reads(text).content, #reads(text).calls })
  end)

  it("parameters in another order than the schema's (llama.cpp 27363), tags on one line", function()
    local t = reads("<tool_call><function=write><parameter=content>b</parameter>"
      .. "<parameter=path>a</parameter></function></tool_call>")
    assert.equal('{"content": "b", "path": "a"}', json.encode(t.calls[1].arguments))
  end)

  it("a name that the next tag cuts short", function()
    assert.equal("now", reads("<tool_call>\n<function=now\n</function>\n</tool_call>")
      .calls[1].name)
  end)

  it("names as long as a tag may be, whole and cut short", function()
    for n = 240, 260 do
      local name = ("f"):rep(n)
      for _, tail in ipairs { ">", "" } do
        local text = ("<tool_call>\n<function=%s%s\n<parameter=a>\n1\n</parameter>\n"
          .. "</function>\n</tool_call>"):format(name, tail)
        local is_call = #("function=" .. name) + (tail == "" and 1 or 0) <= 256
        assert.equal(is_call and 1 or 0, #reads(text).calls, n .. tail)
      end
    end
  end)

  it("a name that is none stays text", function()
    local text = "<tool_call>\n<function=a b{>\n</function>\n</tool_call>"
    local t = reads(text)
    assert.equal(0, #t.calls)
    assert.equal(text, t.content)
  end)

  it("a call tag with anything else behind it stays text", function()
    for _, text in ipairs { "<tool_call>", "<tool_call> well", "a <tool_call>\n</tool_call> b",
      "<tool_call>{broken", "<tool_call>\n{" } do
      local t = reads(text)
      assert.equal(text, (t.content or "") .. (t.unfinished or ""))
    end
  end)
end)

describe("turn: values that hold tags", function()
  local function round(value)
    local t = reads(call("write", { { "path", "x" }, { "content", value } }) .. "\n"
      .. call("now", {}))
    assert.equal(value, t.calls[1].arguments.content)
    assert.equal(2, #t.calls)
  end

  it("a whole call", function()
    round("Use\n" .. call("write", { { "content", "v" }, { "path", "p" } }) .. "\nlike this.")
  end)

  it("closing tags in running text", function()
    round("Write </parameter> and </function> and </tool_call> at the end.")
    round("x = '</parameter>'; y = \"</function>\"")
  end)

  it("a parameter of another tool", function()
    round("<parameter=other>\n1\n</parameter>\nand more")
  end)

  it("an opening tag without its end is read as text in the end", function()
    local value = "The tag is\n<tool_call>\nand so on"
    local t = reads(call("write", { { "path", "x" }, { "content", value } }))
    assert.equal(value, t.calls[1].arguments.content)
  end)
end)

describe("turn: cut off", function()
  local open = "<tool_call>\n<function=bash>\n<parameter=command>\nrm -rf /tmp/"

  it("hands out no call that is cut off (Pi 0.73 would run it)", function()
    for _, reason in ipairs { "length", "stop" } do
      local t = reads("Now. " .. open, nil, reason)
      assert.same({ "Now.", 0, open }, { t.content, #t.calls, t.unfinished })
    end
  end)

  it("not even one whose values are complete, when the limit cut it", function()
    local text = open .. "x\n</parameter>\n"
    assert.equal(0, #reads(text, nil, "length").calls)
    assert.equal(1, #reads(text, nil, "stop").calls)
  end)
end)

describe("turn: Hermes calls", function()
  it("reads one or several", function()
    local t = reads('Well.\n<tool_call>\n{"name": "bash", "arguments": '
      .. '{"command": "echo \\"}\\""}}\n</tool_call>\n<tool_call>\n'
      .. '{"name": "now", "arguments": {}}\n</tool_call>')
    assert.equal('echo "}"', t.calls[1].arguments.command)
    assert.same({ 2, "now", "Well." }, { #t.calls, t.calls[2].name, t.content })
  end)

  it("tolerates Python's spelling, arguments as text, a missing end", function()
    assert.equal(true, reads("<tool_call>{'name': 'pick', 'arguments': {'flag': True}}")
      .calls[1].arguments.flag)
    assert.equal(1, reads('<tool_call>{"name": "pick", "arguments": "{\\"n\\": 1}"}</tool_call>')
      .calls[1].arguments.n)
  end)

  it("leaves what is no call as text", function()
    local text = '<tool_call>{"name": 3}</tool_call>'
    local t = reads(text)
    assert.same({ 0, text }, { #t.calls, t.content })
  end)
end)

describe("turn: growing calls", function()
  it("are one JSON object in pieces", function()
    local text = call("pick", { { "n", "3" }, { "flag", "true" } }) .. call("now", {})
    for _, step in ipairs { 1, 5, #text } do
      local pieces, starts, calls = { [0] = "", "" }, {}, {}
      local reader = turn.reader { tools = TOOLS, stream_arguments = true }
      local function take(parts)
        for _, part in ipairs(parts) do
          if part.kind == "call_start" then
            starts[#starts + 1] = part
          elseif part.kind == "call_arguments" then
            pieces[part.index] = pieces[part.index] .. part.text
          elseif part.kind == "call" then
            calls[#calls + 1] = part
          end
        end
      end
      for at = 1, #text, step do take(reader:feed(text:sub(at, at + step - 1))) end
      take(reader:finish())
      assert.same({ 2, 2 }, { #starts, #calls })
      for i = 1, 2 do
        assert.equal(json.encode(calls[i].arguments), pieces[i - 1])
        assert.equal(calls[i].id, starts[i].id)
      end
    end
  end)
end)
