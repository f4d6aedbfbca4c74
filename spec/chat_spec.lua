local chat = require "moonlet.chat"
local json = require "moonlet.json"
local template = require "moonlet.template"

local function messages(text)
  local list, message, code = chat.messages(assert(json.decode(text)))
  return list and json.encode(list), message, code
end

describe("chat.messages", function()
  it("makes one system message of all, developers' included", function()
    assert.equal('[{"role": "system", "content": "A\\n\\nB\\n\\nC"}, '
      .. '{"role": "user", "content": "x"}]', messages [=[[
      {"role": "system", "content": "A"}, {"role": "user", "content": "x"},
      {"role": "developer", "content": [{"type": "text", "text": "B"}]},
      {"role": "system", "content": ""}, {"role": "system", "content": "C"}]]=])
  end)

  it("takes text from strings, null and lists of parts, for every role", function()
    assert.equal('[{"role": "user", "content": "ab"}, {"role": "assistant", "content": ""}, '
      .. '{"role": "tool", "content": "r", "tool_call_id": "c"}]', messages [=[[
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text",
      "text": "b"}]}, {"role": "assistant", "content": null}, {"role": "tool", "content":
      [{"type": "text", "text": "r"}], "tool_call_id": "c", "extra": 1}]]=])
  end)

  it("knows reasoning by any of its names", function()
    for _, field in ipairs { "reasoning_content", "reasoning", "reasoning_text" } do
      assert.matches('"reasoning_content": "why"', (messages(([=[[{"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "%s": "why"}]]=]):format(field))), 1, true)
    end
  end)

  it("finds thoughts in front of a text, and takes tags elsewhere for text", function()
    local function split(text)
      local list = assert(chat.messages(json.array { { role = "user", content = "q" },
        { role = "assistant", content = text } }))
      return { list[2].reasoning_content or false, list[2].content }
    end
    assert.same({ "\nwhy\n", "\n\na </think>" }, split "<think>\nwhy\n</think>\n\na </think>")
    assert.same({ "why\n", "\n\na" }, split "why\n</think>\n\na")
    for _, text in ipairs { "Close it by </think>.", "It is\n<think>\nx\n</think>",
      "<think>\nnever closed" } do
      assert.same({ false, text }, split(text))
    end
    assert.matches('"content": "<think>x</think>y"', (messages [=[[
      {"role": "assistant", "content": "<think>x</think>y", "reasoning": "z"}]]=]), 1, true)
  end)

  local function arguments(given)
    local list = assert(chat.messages(assert(json.decode(([=[[{"role": "user", "content": "q"},
      {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function",
      "function": {"name": "f", "arguments": %s}}]}]]=]):format(given)))))
    return json.encode(list[2].tool_calls[1]["function"].arguments)
  end

  it("makes objects of arguments, also of broken ones (vllm 47761)", function()
    assert.equal('{"b": 1, "a": [2]}', arguments [["{\"b\": 1, \"a\": [2]}"]])
    assert.equal('{"b": 1}', arguments '{"b": 1}')
    assert.equal("{}", arguments '""')
    assert.equal("{}", arguments "null")
    assert.equal("{}", arguments '"[]"')
    assert.equal('{"a": true}', arguments [["{'a': True}"]])
    assert.equal([[{"_raw": "{\"command\": \"rm -rf"}]], arguments [["{\"command\": \"rm -rf"]])
    assert.equal('{"_raw": "3"}', arguments "3")
  end)

  it("adds a question where there is none", function()
    assert.equal('[{"role": "system", "content": "S"}, {"role": "user", "content": ""}, '
      .. '{"role": "tool", "content": "r"}]', messages [=[[{"role": "system", "content": "S"},
      {"role": "tool", "content": "r"}]]=])
  end)

  it("names the place of what cannot be", function()
    for text, expected in pairs {
      ['{}'] = "messages: a list expected",
      ['[]'] = "messages: at least one message expected",
      ['[1]'] = "messages[0]: an object expected",
      ['[{"role": "x"}]'] = "messages[0].role: system, developer, user, assistant or tool expected",
      ['[{"role": "user", "content": 3}]'] = "messages[0].content: a string or a list expected",
      ['[{"role": "user", "content": [3]}]'] = "messages[0].content[0]: an object expected",
      ['[{"role": "assistant", "tool_calls": 1}]'] = "messages[0].tool_calls: a list expected",
      ['[{"role": "assistant", "tool_calls": [{}]}]'] =
        "messages[0].tool_calls[0]: a function name expected",
      ['[{"role": "user", "content": [{"type": "text", "text": 5}]}]'] =
        "messages[0].content[0].text: a string expected",
      ['[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]'] =
        'messages[0].content[0]: parts of type "image_url" are not supported, only text',
    } do
      local list, message = messages(text)
      assert.is_nil(list)
      assert.equal(expected, message)
    end
  end)

  it("makes what Qwen3.6's own template takes", function()
    local chat_template = assert(template.open("examples/demo-model"))
    for _, text in ipairs {
      '[{"role": "developer", "content": "A"}, {"role": "system", "content": "B"}, '
        .. '{"role": "user", "content": [{"type": "text", "text": "hi"}]}]',
      '[{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", '
        .. '"arguments": "{broken"}}]}, {"role": "tool", "content": "r"}]',
    } do
      assert(chat_template:render(assert(chat.messages(assert(json.decode(text))))))
    end
  end)
end)

describe("chat.tools", function()
  local function tools(text)
    local list, message = chat.tools(assert(json.decode(text)))
    return list and json.encode(list), message
  end

  it("wraps bare ones and leaves wrapped ones as they are", function()
    local wrapped = '[{"type": "function", "function": {"name": "f"}, "strict": false}]'
    assert.equal(wrapped, tools(wrapped))
    assert.equal('[{"type": "function", "function": {"name": "f"}}]', tools '[{"name": "f"}]')
  end)

  it("takes an empty list for none (Pi sends it)", function()
    assert.same({}, { tools "[]" })
    assert.same({}, { tools "null" })
  end)

  it("names the place of what cannot be", function()
    assert.equal("tools[1]: a function name expected",
      select(2, tools '[{"name": "f"}, {"function": {}}]'))
    assert.equal("tools: a list expected", select(2, tools "3"))
    for _, parameters in ipairs { "[1]", "[]", '"{}"', "1", "true" } do
      assert.equal("tools[0].parameters: an object expected",
        select(2, tools('[{"name": "f", "parameters": ' .. parameters .. "}]")))
    end
    for _, parameters in ipairs { "{}", "null" } do
      local wrapped = ('[{"function": {"name": "f", "parameters": %s}}]'):format(parameters)
      assert.equal(wrapped, tools(wrapped))
    end
  end)
end)
