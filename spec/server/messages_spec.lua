-- /v1/messages and /v1/messages/count_tokens: Anthropic's dialect.

local client = require "spec.support.client"
local dialogue = require "spec.support.dialogue"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local said = require "spec.support.said"
local served = require "spec.support.served"

local PATH <const> = "/v1/messages"
local COUNT <const> = "/v1/messages/count_tokens"
local USER <const> = { role = "user", content = "Hi" }
local ADAPTIVE <const> = { type = "adaptive" }
local CALL <const> = said.CALL

local WEATHER <const> = { name = "weather", description = "Tells the weather.",
  input_schema = { type = "object", properties = { city = { type = "string" },
    days = { type = "integer" } } } }

local function body_of(more)
  local body = { model = "m", max_tokens = 500, messages = { USER } }
  for name, value in pairs(more or {}) do body[name] = value end
  return body
end

-- A message from its events, as the SDK puts it together (anthropic 2.12.0,
-- lib/streaming/_messages.py), with the order of events checked.
local function assemble(events)
  local message, open, json_text = nil, nil, nil
  local stopped = false
  for _, e in ipairs(events) do
    assert.is_false(stopped, "something behind message_stop")
    if e.type == "message_start" then
      assert.is_nil(message)
      message = e.message
    elseif e.type == "content_block_start" then
      assert.is_nil(open)
      assert.equal(#message.content, e.index)
      open, json_text = e.content_block, ""
      table.insert(message.content, open)
    elseif e.type == "content_block_delta" then
      assert.equal(#message.content - 1, e.index)
      local d = e.delta
      if d.type == "text_delta" then
        open.text = open.text .. d.text
      elseif d.type == "thinking_delta" then
        open.thinking = open.thinking .. d.thinking
      elseif d.type == "signature_delta" then
        open.signature = d.signature
      else
        assert.equal("input_json_delta", d.type)
        json_text = json_text .. d.partial_json
      end
    elseif e.type == "content_block_stop" then
      if open.type == "tool_use" then open.input = json.decode(json_text) or json_text end
      open = nil
    elseif e.type == "message_delta" then
      assert.is_nil(open)
      message.stop_reason, message.stop_sequence = e.delta.stop_reason, e.delta.stop_sequence
      message.usage = e.usage
    elseif e.type == "message_stop" then
      stopped = true
    elseif e.comment == nil then
      assert.equal("ping", e.type)
    end
  end
  assert.is_true(stopped)
  return message
end

-- A message without what is new each time.
local function essence(message)
  assert.matches("^msg_%x+$", message.id)
  message.id = nil
  for _, block in ipairs(message.content) do
    if block.type == "tool_use" then
      assert.matches("^toolu_%x+$", block.id)
      block.id, block.input = nil, json.encode(block.input)
    end
  end
  return json.decode(json.encode(message))
end

describe("/v1/messages", function()
  local server
  after_each(function() if server then server:close() end end)

  local ask, stream = client.dialect(PATH, body_of, function() return server end)

  -- The text of the prompt that a request becomes.
  local function prompt_of(more)
    local prompts = served.prompts(server)
    local reply = ask(more)
    assert.equal(200, reply.status, reply.body)
    return prompts[1]
  end

  it("answers a message", function()
    server = served.replay { "Paris is the capital." }
    local reply = ask { model = "any-name" }
    assert.equal(200, reply.status, reply.body)
    local r = reply.json
    assert.matches("^msg_%x+$", r.id)
    assert.same({ "message", "assistant", "any-name", "end_turn", json.null },
      { r.type, r.role, r.model, r.stop_reason, r.stop_sequence })
    assert.same({ { type = "text", text = "Paris is the capital." } }, json.decode(
      json.encode(r.content)))
    assert.is_true(r.usage.input_tokens > 5 and r.usage.output_tokens > 2)
    assert.same({ 0, 0 }, { r.usage.cache_read_input_tokens, r.usage.cache_creation_input_tokens })
  end)

  it("streams thoughts, text and calls, block by block", function()
    server = served.replay { "I think.\n</think>\n\nLet me look.\n\n" .. CALL }
    local events, reply = stream { tools = { WEATHER }, thinking = ADAPTIVE }
    assert.equal("text/event-stream; charset=utf-8", reply.fields["content-type"])
    assert.equal("message_start", events[1].type)
    assert.equal(json.null, events[1].message.stop_reason)
    assert.equal("ping", events[2].type)
    local message = assemble(events)
    assert.equal("tool_use", message.stop_reason)
    assert.is_true(message.usage.output_tokens_details.thinking_tokens > 2)
    assert.same({ { type = "thinking", thinking = "I think.", signature = "moonlet" },
      { type = "text", text = "Let me look." }, { type = "tool_use", name = "weather",
        input = '{"city": "Paris", "days": 3}' } }, essence(message).content)
  end)

  it("says the same streamed and whole, whatever the steps", function()
    local more = { tools = { WEATHER }, thinking = ADAPTIVE }
    local streamed = body_of(more)
    streamed.stream = true
    said.in_all_ways(PATH, body_of(more), streamed, function(name, replies, grows)
      -- A call that is cut off is no object, so only a stream can show how it grew.
      if grows and name == "a call cut off" then return end
      local expected
      for i, reply in ipairs(replies) do
        assert.equal(200, reply.status, name)
        local got = essence(reply.json or assemble(client.events(reply)))
        expected = expected or got
        assert.same(expected, got, ("%s, request %d"):format(name, i))
      end
    end)
  end)

  it("failure 12: a call cut off never becomes one that can be run", function()
    local cut = { text = said.TEXTS["a call cut off"], finish_reason = "length" }
    for _, streamed in ipairs { false, true } do
      server = served.replay({ cut }, { stream_tool_args = streamed })
      local whole = ask { tools = { WEATHER }, thinking = ADAPTIVE }.json
      assert.same({ "max_tokens", "text" }, { whole.stop_reason, whole.content[1].type })
      assert.matches("<function=weather>.*Par$", whole.content[1].text)
      local message = assemble((stream { tools = { WEATHER }, thinking = ADAPTIVE }))
      assert.equal("max_tokens", message.stop_reason)
      assert.is_not_table(message.content[1].input)
      server:close()
    end
  end)

  it("failure 13: reasoning that takes everything stays reasoning", function()
    server = served.replay { { text = "still thinking", finish_reason = "length" } }
    for _, reply in ipairs { ask({ thinking = ADAPTIVE }).json,
      assemble((stream { thinking = ADAPTIVE })) } do
      assert.same({ "max_tokens", 1, "still thinking" },
        { reply.stop_reason, #reply.content, reply.content[1].thinking })
    end
  end)

  it("thinks when it is told to, and hides thoughts without forgetting them", function()
    server = served.replay { "Hm.\n</think>\n\nYes." }
    local shown = ask { thinking = { type = "enabled", budget_tokens = 1024 } }.json.content
    assert.same({ "Hm.", "moonlet", "Yes." },
      { shown[1].thinking, shown[1].signature, shown[2].text })
    for _, more in ipairs { {}, { thinking = { type = "disabled" } } } do
      assert.equal("text", ask(more).json.content[1].type)
    end
    local hide = { type = "adaptive", display = "omitted" }
    local hidden = ask { thinking = hide }.json.content
    assert.same({ "", "Yes." }, { hidden[1].thinking, hidden[2].text })
    assert.same(json.encode(hidden), json.encode(assemble((stream { thinking = hide })).content))
    for _, content in ipairs { shown, hidden } do
      assert.matches("<think>\nHm.\n</think>\n\nYes.", prompt_of { messages = { USER,
        { role = "assistant", content = content }, { role = "user", content = { {
          type = "tool_result", tool_use_id = "x", content = "go on" } } } } }, 1, true)
    end
  end)

  it("reads what clients send", function()
    server = served.replay { "ok" }
    local call = { type = "tool_use", id = "t1", name = "weather", input = { city = "Rome" } }
    local cached = { type = "ephemeral" }
    local text = prompt_of {
      system = { { type = "text", text = "x-anthropic-billing-header: cc_version=1;" },
        { type = "text", text = "Be brief.", cache_control = cached },
        { type = "text", text = "Be kind." } },
      metadata = { user_id = "u" }, context_management = {}, service_tier = "auto", top_k = 5,
      messages = {
        { role = "user", content = { { type = "text", text = "One." },
          { type = "text", text = "Two.", cache_control = cached } } },
        { role = "system", content = "Three." },
        { role = "assistant", content = { { type = "redacted_thinking", data = "?" },
          { type = "text", text = "Looking" }, { type = "text", text = " it up." }, call } },
        { role = "user", content = {
          { type = "tool_result", tool_use_id = "t1", is_error = true,
            content = { { type = "text", text = "no" }, { type = "text", text = " net" } } },
          { type = "tool_result", tool_use_id = "t2" }, { type = "text", text = "Again." } } },
        { role = "system", content = "Be quick." },
      },
      tools = { WEATHER },
    }
    assert.is_nil(text:find("billing", 1, true))
    assert.is_nil(text:find("cache_control", 1, true))
    assert.matches('\n{"type": "function", "function": {"name": "weather", "description": '
      .. '"Tells the weather.", "parameters": {', text, 1, true)
    assert.matches("\n\nBe brief.\n\nBe kind.<|im_end|>\n<|im_start|>user\nOne.\n\nTwo.\n\nThree."
      .. "<|im_end|>\n<|im_start|>assistant\nLooking it up.\n\n<tool_call>\n<function=weather>\n"
      .. "<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
      .. "<|im_start|>user\n<tool_response>\nError: no net\n</tool_response>\n<tool_response>\n\n"
      .. "</tool_response><|im_end|>\n<|im_start|>user\nAgain.\n\nBe quick.<|im_end|>\n"
      .. "<|im_start|>assistant\n", text, 1, true)
  end)

  it("refuses messages that say nothing at all", function()
    server = served.replay { "Hello." }
    for _, role in ipairs { "user", "assistant", "system" } do
      local reply = client.ask(server, "POST", PATH, { max_tokens = 9,
        messages = { { role = role }, { role = role, content = json.array {} } } })
      assert.equal(400, reply.status, reply.body)
      assert.matches("at least one message", reply.json.error.message, 1, true)
    end
  end)

  it("describes tools that are found later where they are found", function()
    server = served.replay { CALL }
    local later = { name = "weather", description = "Tells.", defer_loading = true,
      input_schema = WEATHER.input_schema }
    local messages = { USER,
      { role = "assistant", content = { { type = "tool_use", id = "s", name = "search",
        input = json.object {} } } },
      { role = "user", content = { { type = "tool_result", tool_use_id = "s", content = {
        { type = "tool_reference", tool_name = "weather" } } } } } }
    local tools = { { name = "search", input_schema = { type = "object" } }, later }
    local text = prompt_of { tools = tools, messages = messages }
    assert.matches('<tool_response>\n<function>{"name": "weather", "description": "Tells.", ', text,
      1, true)
    assert.equal(2, select(2, text:gsub('"Tells%."', "")) + select(2, text:gsub('"search"', "")))
    local call = ask { tools = tools, messages = messages }.json.content[1]
    assert.equal(3, call.input.days)
  end)

  it("keeps to stop sequences, limits and choices of tools", function()
    server = served.replay { "one END two" }
    local cut = ask { stop_sequences = { "END" } }.json
    assert.same({ "stop_sequence", "END", "one " },
      { cut.stop_reason, cut.stop_sequence, cut.content[1].text })
    assert.equal("max_tokens", ask { max_tokens = 1 }.json.stop_reason)
    server:close()
    server = served.replay { CALL .. "\n" .. CALL }
    for _, more in ipairs { { tools = { WEATHER }, tool_choice = { type = "none" } }, {} } do
      local none = ask(more).json
      assert.same({ "end_turn", CALL .. "\n" .. CALL }, { none.stop_reason, none.content[1].text })
    end
    local one = ask { tools = { WEATHER }, tool_choice = { type = "auto",
      disable_parallel_tool_use = true } }.json
    assert.equal(1, #one.content)
    assert.equal(2, #ask({ tools = { WEATHER } }).json.content)
  end)

  it("counts the tokens of the prompt", function()
    server = served.replay { "ok" }
    for _, more in ipairs { {}, { system = "Be brief.", tools = { WEATHER } },
      { thinking = ADAPTIVE } } do
      local count = client.ask(server, "POST", COUNT, body_of(more)).json
      assert.equal(ask(more).json.usage.input_tokens, count.input_tokens)
    end
    local long = { messages = { { role = "user", content = ("word "):rep(9000) },
      { role = "assistant", content = "Yes." } } }
    assert.is_true(client.ask(server, "POST", COUNT, body_of(long)).json.input_tokens > 9000)
  end)

  it("refuses in Anthropic's shape, naming the place", function()
    server = served.replay({ "ok" }, { limits = { messages = 3, tools = 2 } })
    local picture = { type = "image", source = { type = "base64", data = "" } }
    for _, row in ipairs {
      { "messages", { messages = json.array {} } },
      { "messages", { messages = { USER, USER, USER, USER } } },
      { "messages", { messages = { USER, { role = "assistant", content = " " } } } },
      { "messages", { messages = { USER, { role = "assistant", content = { { type = "tool_use",
        id = "x", name = "f", input = { a = 1 } } } } } } },
      { "messages[0]", { messages = { "hi" } } },
      { "messages[0].role", { messages = { { role = "tool", content = "x" } } } },
      { "messages[0].content", { messages = { { role = "user", content = 5 } } } },
      { "messages[0].content[0].type",
        { messages = { { role = "user", content = { picture } } } } },
      { "messages[0].content[0].content[0].type", { messages = { { role = "user", content = {
        { type = "tool_result", tool_use_id = "x", content = { picture } } } } } } },
      { "messages[0].content[0].content[0].text", { messages = { { role = "user", content = {
        { type = "tool_result", tool_use_id = "x", content = { { source = 1 } } } } } } } },
      { "messages[1].content[0].input", { messages = { USER, { role = "assistant", content = { {
        type = "tool_use", id = "x", name = "f", input = "str" } } } } } },
      { "messages[0].content[0].text", { messages = { { role = "user",
        content = { { type = "text" } } } } } },
      { "system", { system = 5 } },
      { "max_tokens", { max_tokens = 0 } },
      { "temperature", { temperature = "hot" } },
      { "top_p", { top_p = 1.5 } },
      { "stop_sequences", { stop_sequences = { 1 } } },
      { "thinking.type", { thinking = { type = "deep" } } },
      { "thinking.budget_tokens", { thinking = { type = "enabled", budget_tokens = -1 } } },
      { "tools", { tools = { WEATHER, WEATHER, WEATHER } } },
      { "tools[1].name", { tools = { WEATHER, WEATHER } } },
      { "tools[0].name", { tools = { { input_schema = {} } } } },
      { "tools[0].type", { tools = { { type = "web_search_20250305", name = "web_search" } } } },
      { "tool_choice.type", { tools = { WEATHER }, tool_choice = { type = "any" } } },
      { "tool_choice.type", { tools = { WEATHER },
        tool_choice = { type = "tool", name = "weather" } } },
      { "tool_choice.type", { tool_choice = { type = "some" } } },
      { "output_config.format", { output_config = { format = { type = "json_schema" } } } },
    } do
      local reply = ask(row[2])
      assert.equal(400, reply.status, row[1] .. reply.body)
      assert.same({ "error", "invalid_request_error" }, { reply.json.type, reply.json.error.type })
      assert.equal(row[1], reply.json.error.message:match("^(.-): "))
    end
    assert.matches("constrained decoding", ask { tools = { WEATHER },
      tool_choice = { type = "any" } }.json.error.message)
  end)

  it("goes on with what the assistant has begun to say", function()
    server = served.replay { " 42, of course." }
    local prompts = served.prompts(server)
    for _, content in ipairs { "The answer is ", { { type = "text", text = "The answer" },
      { type = "text", text = " is" } } } do
      local body = body_of { messages = { USER, { role = "assistant", content = content } } }
      local reply = client.ask(server, "POST", PATH, body)
      assert.equal(200, reply.status, reply.body)
      assert.same({ "text", " 42, of course." },
        { reply.json.content[1].type, reply.json.content[1].text })
      assert.matches("\nThe answer is$", prompts[#prompts])
      local counted = client.ask(server, "POST", COUNT, body).json
      assert.equal(reply.json.usage.input_tokens, counted.input_tokens)
      body.stream = true
      local message = assemble(client.events(client.ask(server, "POST", PATH, body)))
      assert.equal(" 42, of course.", message.content[1].text)
    end
  end)

  it("refuses in Anthropic's shape before a handler is reached", function()
    server = served.replay({ "ok" }, { api_keys = { "k" }, limits = { body_bytes = 1000 } })
    for _, path in ipairs { PATH, COUNT } do
      for _, row in ipairs {
        { 401, "authentication_error", "POST", body_of() },
        { 405, "invalid_request_error", "GET", nil, { ["x-api-key"] = "k" } },
        { 413, "request_too_large", "POST", { a = ("x"):rep(1000) }, { ["x-api-key"] = "k" } },
        { 400, "invalid_request_error", "POST", "{", { Authorization = "Bearer k" } },
        { 200, nil, "POST", body_of(), { ["x-api-key"] = "k",
          ["anthropic-version"] = "2023-06-01" } },
      } do
        local reply = client.ask(server, row[3], path .. "?beta=true", row[4], row[5])
        assert.same({ row[1], row[2] }, { reply.status, (reply.json.error or {}).type })
      end
    end
    server:close()
    server = served.replay { "ok" }
    local evil = ask({}, { Origin = "http://evil.example" })
    assert.same({ 403, "permission_error" }, { evil.status, evil.json.error.type })
  end)

  it("failure 21: says that a prompt is too long, in the words that clients know", function()
    server = served.replay({ "ok" }, { ctx = 32 })
    local reply = ask { messages = { { role = "user", content = ("word "):rep(100) } } }
    assert.equal(400, reply.status)
    assert.matches("^This model's maximum context length is 32 tokens. However, your request has "
      .. "%d+ input tokens.$", reply.json.error.message)
  end)

  it("ends a stream that fails with the error", function()
    server = served.replay { { text = "some", finish_reason = "error", message = "bad weight" } }
    local events = stream {}
    local last = events[#events]
    assert.same({ "error", "api_error", "bad weight" },
      { last.type, last.error.type, last.error.message })
    local whole = ask {}
    assert.same({ 500, "api_error" }, { whole.status, whole.json.error.type })
  end)

  it("failure 16: keeps silent streams alive", function()
    server = served.replay({ { text = CALL, delay_ms = 2 } }, { heartbeat = 0.001 })
    local events = stream { tools = { WEATHER } }
    local comments, pings = 0, 0
    for i, event in ipairs(events) do
      if event.comment then comments = comments + 1 end
      if i > 2 and event.type == "ping" then pings = pings + 1 end
    end
    assert.is_true(comments >= 1 and pings >= 1, comments .. " " .. pings)
    assert.equal("tool_use", assemble(events).stop_reason)
  end)
end)

describe("a dialogue over /v1/messages", function()
  local model
  setup(function() model = assert(moonlet.open(served.DIR, { threads = 2 })) end)
  teardown(function() model:close() end)

  -- `follow` is what a user says to the i-th answer.
  local function play(said_by_model, options, more, follow)
    local body = body_of(more)
    body.messages, body.tools = { USER }, { WEATHER }
    return dialogue.play(model, said_by_model, options, { path = PATH,
      body = body,
      hear = function(reply, i)
        table.insert(body.messages, { role = "assistant", content = reply.content })
        table.insert(body.messages, { role = "user", content = follow(i, reply.content) })
        local u = reply.usage
        return { prompt = u.input_tokens + u.cache_read_input_tokens,
          cached = u.cache_read_input_tokens, completion = u.output_tokens }
      end })
  end

  it("of tools evaluates each token once, with and without thoughts", function()
    for _, thinking in ipairs { { type = "disabled" },
      { type = "adaptive", display = "omitted" } } do
      local thought = thinking.type == "adaptive" and "Hm,  so.\n</think>\n\n" or ""
      local all_found, most_new = play(thought .. dialogue.CALL, {}, { thinking = thinking },
        function(i, content)
          return { { type = "tool_result", tool_use_id = content[#content].id,
            content = "Sun, day " .. i } }
        end)
      assert.is_true(all_found)
      assert.is_true(most_new < 40, most_new)
    end
  end)

  it("of questions evaluates each token once where thoughts are kept, else the last turn twice",
  function()
    for _, kept in ipairs { true, false } do
      local all_found, most_new = play("Hm.\n</think>\n\nIt is so.",
        { template_variables = { preserve_thinking = kept } }, { thinking = ADAPTIVE },
        function(i) return "And " .. i .. "?" end)
      assert.equal(kept, all_found)
      assert.is_true(most_new < 40, most_new)
    end
  end)
end)
