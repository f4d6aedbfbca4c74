-- /v1/chat/completions with scripted answers: requests, replies, streams.

local client = require "spec.support.client"
local json = require "moonlet.json"
local said = require "spec.support.said"
local served = require "spec.support.served"

local PATH <const> = "/v1/chat/completions"
local USER <const> = { { role = "user", content = "Hi" } }
local THINK <const> = { enable_thinking = true }

local WEATHER <const> = { type = "function", ["function"] = { name = "weather", parameters = {
  type = "object", properties = { city = { type = "string" }, days = { type = "integer" },
    stops = { type = "array", items = { type = "object" } } } } } }

local function body_of(more)
  local body = { messages = USER }
  for name, value in pairs(more or {}) do body[name] = value end
  return body
end

-- A stream's deltas of one choice, put together as a client would.
local function assemble(events, index)
  local message, reason, chunks = {}, nil, 0
  for _, event in ipairs(events) do
    local choice = type(event) == "table" and event.choices and event.choices[1]
    if choice and choice.index == (index or 0) then
      chunks = chunks + 1
      for name, value in pairs(choice.delta) do
        if name ~= "tool_calls" then
          message[name] = (message[name] or "") .. value
        else
          message.tool_calls = message.tool_calls or {}
          for _, delta in ipairs(value) do
            local call = message.tool_calls[delta.index + 1]
            if not call then
              call = { id = delta.id, type = delta.type, name = delta["function"].name,
                arguments = "" }
              message.tool_calls[delta.index + 1] = call
            end
            call.arguments = call.arguments .. delta["function"].arguments
          end
        end
      end
      if choice.finish_reason ~= json.null then reason = choice.finish_reason end
    end
  end
  return message, reason, chunks
end

-- The same of a reply that was not streamed.
local function flat(message)
  local made = { role = message.role, reasoning_content = message.reasoning_content,
    content = message.content ~= json.null and message.content or nil }
  for i, call in ipairs(message.tool_calls or {}) do
    made.tool_calls = made.tool_calls or {}
    made.tool_calls[i] = { id = call.id, type = call.type, name = call["function"].name,
      arguments = call["function"].arguments }
  end
  return made
end

local CALL <const>, TEXTS <const> = said.CALL, said.TEXTS

describe("/v1/chat/completions", function()
  local server
  after_each(function() if server then server:close() end end)

  local ask, stream = client.dialect(PATH, body_of, function() return server end)

  it("answers a message", function()
    server = served.replay { "Paris is the capital." }
    local reply = ask { model = "any-name" }
    local r = reply.json
    assert.equal(200, reply.status)
    assert.matches("^chatcmpl%-%x+$", r.id)
    assert.same({ "chat.completion", "any-name", "stop", "assistant", "Paris is the capital." },
      { r.object, r.model, r.choices[1].finish_reason, r.choices[1].message.role,
        r.choices[1].message.content })
    assert.is_nil(r.choices[1].message.tool_calls)
    assert.equal(json.null, r.choices[1].logprobs)
    assert.equal(r.usage.prompt_tokens + r.usage.completion_tokens, r.usage.total_tokens)
    assert.is_true(r.usage.prompt_tokens > 5)
    assert.equal(0, r.usage.prompt_tokens_details.cached_tokens)
    assert.equal(0, r.usage.completion_tokens_details.reasoning_tokens)
  end)

  it("streams in the order that clients expect", function()
    server = served.replay { "I think.\n</think>\n\nLet me look.\n\n" .. CALL }
    local events, reply = stream { tools = { WEATHER }, stream_options = { include_usage = true },
      chat_template_kwargs = THINK }
    assert.equal("text/event-stream; charset=utf-8", reply.fields["content-type"])
    assert.equal("no-cache", reply.fields["cache-control"])
    assert.equal("[DONE]", events[#events])
    local usage = events[#events - 1]
    assert.same({ 0, true }, { #usage.choices, usage.usage.completion_tokens_details
      .reasoning_tokens > 2 })
    assert.equal("tool_calls", events[#events - 2].choices[1].finish_reason)
    assert.same({ role = "assistant", content = "" }, setmetatable(events[1].choices[1].delta, nil))
    local order = {}
    for i = 2, #events - 3 do
      local choice = events[i].choices[1]
      assert.equal(0, choice.index)
      assert.equal(json.null, choice.finish_reason)
      assert.same({ events[1].id, events[1].created }, { events[i].id, events[i].created })
      local kind = next(choice.delta)
      if kind ~= order[#order] then order[#order + 1] = kind end
    end
    assert.same({ "reasoning_content", "content", "tool_calls" }, order)
    local message = assemble(events)
    assert.equal("I think.", message.reasoning_content)
    assert.equal("Let me look.", message.content)
    assert.same({ "weather", '{"city": "Paris", "days": 3}' },
      { message.tool_calls[1].name, message.tool_calls[1].arguments })
  end)

  -- What a client has in the end, without ids, as far as it says something.
  local function essence(message, reason)
    for _, call in ipairs(message.tool_calls or {}) do
      assert.matches("^call_%x+$", call.id)
      call.id = nil
    end
    if message.content == "" then message.content = nil end
    return { message, reason }
  end

  it("says the same streamed and whole, whatever the steps", function()
    local more = { tools = { WEATHER }, chat_template_kwargs = THINK }
    local streamed = body_of(more)
    streamed.stream = true
    said.in_all_ways(PATH, body_of(more), streamed, function(name, replies)
      local expected
      for i, reply in ipairs(replies) do
        assert.equal(200, reply.status, name)
        local choice = reply.json and reply.json.choices[1]
        local got = choice and essence(flat(choice.message), choice.finish_reason)
          or essence(assemble(client.events(reply)))
        expected = expected or got
        assert.same(expected, got, ("%s, request %d"):format(name, i))
      end
    end)
  end)

  -- What clients have of those turns, besides the same in all ways.
  it("failures 1, 7 to 11, 18, 20, 23, 24: says what was meant", function()
    local paris = '{"city": "Paris", "days": 3}'
    local meant <const> = {
      ["failure 1: a call inside reasoning that is not closed"] = { "I should call.", "", paris },
      ["failure 8: typed arguments"] = { "", "", paris },
      ["failure 9: a list of objects as Python spells it"] = { "", "",
        '{"stops": [{"name": "Rome", "open": true}, {"name": "L\'Aquila", "open": null}]}' },
      ["failure 10: text before and between calls"] = { "x", "First:Done.", paris, paris },
      ["failure 11: missing closing tags"] = { "", "", '{"city": "Rome", "days": 2}' },
      ["failure 18: a Hermes call"] = { "", "", '{"city": "A"}' },
      ["failure 20: a call without parameters"] = { "", "", "{}" },
      ["failure 24: characters of several tokens"] = { "Ünïcödé 🙂🙃",
        "日本語 🎉 тест" },
    }
    for name, text in pairs(TEXTS) do
      assert.equal(name:find("^failure") ~= nil, meant[name] ~= nil, name)
      if meant[name] then
        server = served.replay { { text = text, tokens_per_step = 2 } }
        local message, reason = assemble((stream { tools = { WEATHER },
          chat_template_kwargs = THINK }))
        local got = { message.reasoning_content or "", message.content }
        for i, call in ipairs(message.tool_calls or {}) do
          assert.same({ "function", "weather" }, { call.type, call.name })
          got[i + 2] = call.arguments
        end
        assert.same(meant[name], got, name)
        assert.equal(#got > 2 and "tool_calls" or "stop", reason)
        server:close()
      end
    end
  end)

  it("types arguments by the schema and always sends an object", function()
    server = served.replay { CALL, TEXTS["failure 20: a call without parameters"], CALL }
    local typed = ask { tools = { WEATHER } }.json.choices[1]
    assert.same({ "tool_calls", '{"city": "Paris", "days": 3}', json.null }, { typed.finish_reason,
      typed.message.tool_calls[1]["function"].arguments, typed.message.content })
    assert.equal("{}", ask { tools = { WEATHER } }.json.choices[1].message
      .tool_calls[1]["function"].arguments)
    local other = { type = "function", ["function"] = { name = "f" } }
    local bare = ask { tools = { other } }.json.choices[1].message.tool_calls[1]["function"]
    assert.equal('{"city": "Paris", "days": "3"}', bare.arguments)
  end)

  it("looks for calls only where tools are offered", function()
    server = served.replay { CALL }
    for _, more in ipairs { {}, { tools = json.array {} },
      { tools = { WEATHER }, tool_choice = "none" } } do
      local choice = ask(more).json.choices[1]
      assert.same({ "stop", CALL }, { choice.finish_reason, choice.message.content })
      assert.is_nil(choice.message.tool_calls)
      local message, reason = assemble((stream(more)))
      assert.same({ CALL, "stop" }, { message.content, reason })
    end
  end)

  it("shows a call that is cut off before its first value as open JSON", function()
    server = served.replay({ { text = "<tool_call>\n<function=weather>\n<parameter=city>\nPar",
      finish_reason = "length" } }, { stream_tool_args = true })
    local message, reason = assemble((stream { tools = { WEATHER } }))
    assert.same({ "{", "length" }, { message.tool_calls[1].arguments, reason })
  end)

  it("failure 12: a call cut off never becomes one that can be run, and history may hold it",
  function()
    local cut = { text = TEXTS["a call cut off"], finish_reason = "length" }
    server = served.replay { cut, "ok" }
    local choice = ask { tools = { WEATHER }, chat_template_kwargs = THINK }.json.choices[1]
    assert.equal("length", choice.finish_reason)
    assert.is_nil(choice.message.tool_calls)
    assert.matches("<function=weather>.*Par$", choice.message.content)
    local reply = ask { tools = { WEATHER }, messages = { USER[1],
      { role = "assistant", content = json.null, tool_calls = { { id = "c1", type = "function",
        ["function"] = { name = "weather", arguments = '{"city": "Par' } } } },
      { role = "tool", tool_call_id = "c1", content = "error" } } }
    assert.equal(200, reply.status)
    server:close()
    server = served.replay({ cut }, { stream_tool_args = true })
    local message, reason = assemble((stream { tools = { WEATHER }, chat_template_kwargs = THINK }))
    assert.equal("length", reason)
    assert.is_nil((json.decode(message.tool_calls and message.tool_calls[1].arguments or "{")))
  end)

  it("failure 13: reasoning that takes everything stays reasoning", function()
    server = served.replay { { text = "still thinking about it", finish_reason = "length" } }
    local choice = ask { chat_template_kwargs = THINK }.json.choices[1]
    assert.same({ "length", "still thinking about it", json.null }, { choice.finish_reason,
      choice.message.reasoning_content, choice.message.content })
  end)

  it("failure 14: an answer without thinking is content", function()
    server = served.replay { "Just this." }
    for _, more in ipairs { { enable_thinking = false }, { reasoning_effort = "none" },
      { chat_template_kwargs = { enable_thinking = false }, reasoning_effort = "high" } } do
      local message = ask(more).json.choices[1].message
      assert.same({ "Just this." }, { message.content, message.reasoning_content })
    end
    for _, more in ipairs { { enable_thinking = true }, { reasoning_effort = "low" },
      { chat_template_kwargs = THINK } } do
      assert.equal("Just this.", ask(more).json.choices[1].message.reasoning_content)
    end
  end)

  it("failure 15: stop strings end content, not reasoning", function()
    server = served.replay { "one END two</think>\n\nthree EN four END five" }
    local more = { stop = { "END", "never" }, chat_template_kwargs = THINK }
    local choice = ask(more).json.choices[1]
    assert.same({ "stop", "END", "one END two", "three EN four " }, { choice.finish_reason,
      choice.stop_reason, choice.message.reasoning_content, choice.message.content })
    more.include_stop_str_in_output = true
    local message, reason = assemble((stream(more)))
    assert.same({ "three EN four END", "stop" }, { message.content, reason })
  end)

  it("failures 2, 3, 4: system messages anywhere, developers, no user, lists, null", function()
    server = served.replay { "ok" }
    for _, messages in ipairs {
      { { role = "user", content = "a" }, { role = "system", content = "b" } },
      { { role = "developer", content = "be brief" }, { role = "user", content = "a" } },
      { { role = "assistant", content = "a" }, { role = "tool", content = "b" } },
      { { role = "user", content = { { type = "text", text = "a" } } },
        { role = "assistant", content = json.null }, { role = "user", content = "b" } },
    } do
      assert.equal(200, ask({ messages = messages }).status)
    end
    local picture = ask { messages = { { role = "user", content = { { type = "image_url" } } } } }
    assert.same({ 400, "messages[0].content[0]" },
      { picture.status, picture.json.error.param })
  end)

  it("failures 17, 19: auto tool choice, any model name, empty tools, unknown fields", function()
    server = served.replay { "ok" }
    for _, more in ipairs {
      { tools = { WEATHER }, tool_choice = "auto", parallel_tool_calls = true },
      { tools = json.array {} }, { tools = json.array {}, tool_choice = "auto" },
      { tool_choice = "none" }, { tool_choice = json.null },
      { tools = { { type = "function", ["function"] = { name = "f",
        strict = true } } } },
      { model = "gpt-9", store = false, user = "me", metadata = {}, prompt_cache_key = "k",
        service_tier = "auto", whatever = { 1, 2 } },
      { temperature = json.null, tools = json.null, stop = json.null, n = json.null },
      { max_tokens = 1, max_completion_tokens = 50, top_k = -1, seed = 7.0 },
    } do
      local reply = ask(more)
      assert.equal(200, reply.status, reply.body)
      assert.equal("ok", reply.json.choices[1].message.content)
    end
  end)

  it("leaves calls in the text with tool_choice none, and takes one without parallel calls",
  function()
    server = served.replay { CALL .. "\n" .. CALL }
    local none = ask { tools = { WEATHER }, tool_choice = "none" }.json.choices[1]
    assert.same({ "stop", CALL .. "\n" .. CALL }, { none.finish_reason, none.message.content })
    local one = ask { tools = { WEATHER }, parallel_tool_calls = false }.json.choices[1]
    assert.equal(1, #one.message.tool_calls)
  end)

  it("refuses what it cannot do, naming the field", function()
    server = served.replay { "ok" }
    for _, row in ipairs {
      { "messages", { messages = json.array {} } },
      { "messages", { messages = "hi" } },
      { "messages[0].role", { messages = { { role = "ghost", content = "x" } } } },
      { "temperature", { temperature = "hot" } },
      { "temperature", { temperature = -1 } },
      { "top_p", { top_p = 1.5 } },
      { "n", { n = 0 } }, { "n", { n = 17 } }, { "n", { n = 1.5 } },
      { "max_tokens", { max_tokens = 0 } },
      { "max_completion_tokens", { max_completion_tokens = -5 } },
      { "stop", { stop = { 1 } } },
      { "logit_bias", { logit_bias = { ["999999"] = 1 } } },
      { "logit_bias", { logit_bias = { hello = 1 } } },
      { "logit_bias", { logit_bias = { ["5"] = 1e308 } }, "1e+308 of id 5 is too large" },
      { "top_logprobs", { top_logprobs = 3 } },
      { "top_logprobs", { logprobs = true, top_logprobs = 21 } },
      { "stream_options", { stream_options = { include_usage = true } } },
      { "stream", { stream = "yes" } },
      { "tools[0].parameters", { tools = { { type = "function", ["function"] = { name = "f",
        parameters = { 1 } } } } } },
      { "tool_choice", { tool_choice = "required" } },
      { "tool_choice", { tool_choice = "auto" }, "only with tools" },
      { "tool_choice", { tool_choice = "auto", tools = json.null }, "only with tools" },
      { "tool_choice", { tool_choice = "required", tools = { WEATHER } } },
      { "tool_choice", { tools = { WEATHER },
        tool_choice = { type = "function", ["function"] = { name = "weather" } } } },
      { "tool_choice", { tools = { WEATHER },
        tool_choice = { type = "function", ["function"] = { name = "other" } } } },
      { "response_format", { response_format = { type = "json_object" } } },
      { "response_format", { response_format = { type = "json_schema" } } },
      { "reasoning_effort", { reasoning_effort = "extreme" } },
      { "continue_final_message", { continue_final_message = true,
        add_generation_prompt = true } },
      { "messages", { continue_final_message = true } },
      { "prompt_logprobs", { prompt_logprobs = 1, stream = true } },
      { "chat_template", { chat_template = "x" } },
      { "stop_token_ids", { stop_token_ids = { -1 } } },
    } do
      local reply = ask(row[2])
      assert.equal(400, reply.status, row[1] .. json.encode(row[2]))
      assert.equal(row[1], reply.json.error.param, reply.body)
      assert.matches(row[3] or "", reply.json.error.message, 1, true)
    end
    local template = ask { chat_template_kwargs = { namespace = 5 } }
    assert.equal(400, template.status)
    assert.matches("^chat_template.jinja:%d+: ", template.json.error.message)
    assert.matches("constrained decoding", ask { response_format = { type = "json_object" } }
      .json.error.message)
  end)

  it("answers nobody freely who asks for a constrained answer", function()
    server = served.replay { "ok" }
    local bodies = { ["/v1/chat/completions"] = { messages = { { role = "user", content = "x" } } },
      ["/v1/completions"] = { prompt = "x" }, ["/v1/responses"] = { input = "x" },
      ["/v1/messages"] = { max_tokens = 9, messages = { { role = "user", content = "x" } } } }
    for path, body in pairs(bodies) do
      for _, name in ipairs { "structured_outputs", "guided_json", "guided_regex", "guided_choice",
        "guided_grammar", "grammar", "json_schema" } do
        for _, row in ipairs { { json.object {}, 400 }, { "x", 400 }, { { "x" }, 400 },
          { true, 400 }, { false, 400 }, { json.null, 200 }, { "", 200 } } do
          body[name] = row[1]
          local reply = client.ask(server, "POST", path, body)
          assert.equal(row[2], reply.status, path .. reply.body)
          if row[2] == 400 then
            assert.matches(name .. ": this needs constrained decoding", reply.json.error.message,
              1, true)
          end
        end
        body[name] = nil
      end
    end
  end)

  it("failure 21: says that a prompt is too long, in the words that clients know", function()
    server = served.replay({ "ok" }, { ctx = 32 })
    local reply = ask { messages = { { role = "user", content = ("word "):rep(100) } } }
    assert.same({ 400, "context_length_exceeded" }, { reply.status, reply.json.error.code })
    assert.matches("^This model's maximum context length is 32 tokens. However, your request has "
      .. "%d+ input tokens.$", reply.json.error.message)
    assert.equal(200, ask { max_tokens = 100000 }.status)
  end)

  it("failure 22: has an index and a finish_reason in each of several choices", function()
    server = served.replay { "first", { text = "second one", finish_reason = "length" } }
    local whole = ask { n = 2 }.json
    local by_reason = {}
    for i, choice in ipairs(whole.choices) do
      assert.equal(i - 1, choice.index)
      by_reason[choice.finish_reason] = choice.message.content
    end
    assert.same({ stop = "first", length = "second one" }, by_reason)
    local events = stream { n = 2 }
    local a, a_reason = assemble(events, 0)
    local b, b_reason = assemble(events, 1)
    assert.same({ "first", "stop", "second one", "length" },
      { a.content, a_reason, b.content, b_reason })
  end)

  it("failure 16: keeps silent streams alive while a prompt is read and a call is held", function()
    server = served.replay({ { text = CALL, prefill_ms = 20, delay_ms = 2 } },
      { heartbeat = 0.001 })
    local events = stream { tools = { WEATHER } }
    local comments, empty = 0, 0
    for i, event in ipairs(events) do
      if event.comment then comments = comments + 1 end
      local delta = event.choices and event.choices[1].delta
      if i > 1 and delta and delta.content == "" and not delta.role then empty = empty + 1 end
    end
    assert.is_true(comments >= 2 and empty >= 2, comments .. " " .. empty)
    assert.equal("tool_calls", select(2, assemble(events)))
  end)

  it("ends a stream that fails with the error", function()
    server = served.replay { { text = "some", finish_reason = "error", message = "bad weight" } }
    local events = stream {}
    assert.equal("[DONE]", events[#events])
    assert.same({ "bad weight", "server_error" },
      { events[#events - 1].error.message, events[#events - 1].error.type })
    local whole = ask {}
    assert.same({ 500, "bad weight" }, { whole.status, whole.json.error.message })
  end)

  it("names reasoning as it is told, or hides it", function()
    server = served.replay({ "hm</think>\n\nyes" }, { reasoning_field = "reasoning" })
    local message = ask { chat_template_kwargs = THINK }.json.choices[1].message
    assert.same({ "hm", "yes" }, { message.reasoning, message.content })
    local hidden = ask { chat_template_kwargs = THINK, include_reasoning = false }
    message = hidden.json.choices[1].message
    assert.same({ "yes" }, { message.content, message.reasoning })
  end)

  it("lists tokens and their log-probabilities", function()
    server = served.replay { "Añ yes" }
    local reply = ask { logprobs = true, top_logprobs = 1, return_token_ids = true }
    assert.equal(json.encode(reply.json), reply.body)
    local choice = reply.json.choices[1]
    local text = {}
    for _, entry in ipairs(choice.logprobs.content) do
      assert.same({ 0.0, 1 }, { entry.logprob, #entry.top_logprobs })
      for _, byte in ipairs(entry.bytes) do text[#text + 1] = string.char(byte) end
    end
    assert.equal("Añ yes", table.concat(text))
    assert.equal(#choice.token_ids, #choice.logprobs.content)
    local n = 0
    for _, event in ipairs(stream { logprobs = true }) do
      local logprobs = event.choices and event.choices[1].logprobs
      if logprobs and logprobs ~= json.null then n = n + #logprobs.content end
    end
    assert.equal(#choice.token_ids, n)
  end)
end)
