-- /v1/responses: OpenAI's newer dialect.

local client = require "spec.support.client"
local dialogue = require "spec.support.dialogue"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local said = require "spec.support.said"
local served = require "spec.support.served"

local PATH <const> = "/v1/responses"
local CALL <const> = said.CALL
local THINK <const> = { effort = "high" }
local SEAL <const> = { "reasoning.encrypted_content" }

local WEATHER <const> = { type = "function", name = "weather", description = "Tells the weather.",
  strict = false, parameters = { type = "object", properties = { city = { type = "string" },
    days = { type = "integer" } } } }

local function body_of(more)
  local body = { model = "m", input = "Hi" }
  for name, value in pairs(more or {}) do body[name] = value end
  return body
end

-- What a client has put together from events, by the kind of an item, with the order of events
-- checked. Deltas, what ends a text and what ends an item must agree.
local function assemble(events)
  local items, last, at = {}, nil, nil
  for i, e in ipairs(events) do
    if not e.comment then
      assert.is_nil(last, "something behind the end")
      at = at and at + 1 or 0
      assert.equal(at, e.sequence_number)
      local name = e.type:match("^response%.(.*)$")
      local item = e.output_index and items[e.output_index + 1]
      if item and e.item_id then assert.equal(item.id, e.item_id) end
      if name == "created" then
        assert.equal(1, i)
      elseif name == "output_item.added" then
        assert.equal(#items, e.output_index)
        assert.equal("in_progress", e.item.status)
        items[#items + 1] = { id = e.item.id, type = e.item.type, name = e.item.name, text = "" }
      elseif name:find("part%.added$") then
        assert.equal("", e.part.text)
        item.part = e.part.type
      elseif name:find("%.delta$") then
        assert.is_nil(item.text_done)
        item.text = item.text .. e.delta
      elseif name:find("text%.done$") or name == "function_call_arguments.done" then
        assert.equal(item.text, e.text or e.arguments)
        item.text_done = true
      elseif name:find("part%.done$") then
        assert.equal(item.text, e.part.text)
      elseif name == "output_item.done" then
        assert.is_true(item.text_done)
        local done = e.item
        local parts = done.content and done.content[1] or done.summary and done.summary[1]
        assert.equal(item.text, done.arguments or parts.text)
        item.done = done
      elseif name == "completed" or name == "incomplete" or name == "failed" then
        last = e.response
      else
        assert.equal("in_progress", name)
      end
    end
  end
  for i, item in ipairs(last.status ~= "failed" and items or {}) do
    assert.equal(json.encode(item.done), json.encode(last.output[i]))
  end
  return last, items
end

-- A response without what is new each time.
local function essence(response)
  local r = assert(json.decode(json.encode(response)))
  assert.matches("^resp_%x+$", r.id)
  r.id, r.created_at, r.completed_at = nil, nil, nil
  for _, item in ipairs(r.output) do
    assert.matches("^%a+_%x+$", item.id)
    item.id = nil
    if item.call_id then
      assert.matches("^call_%x+$", item.call_id)
      item.call_id = nil
    end
  end
  return r
end

-- An item in short.
local function brief(item)
  local part = item.content and item.content[1] or item.summary and item.summary[1]
  return { item.type, item.name or part.type, item.arguments or part.text }
end

describe("/v1/responses", function()
  local server
  after_each(function() if server then server:close() end end)

  local ask, stream = client.dialect(PATH, body_of, function() return server end)

  it("answers a text", function()
    server = served.replay { "Paris is the capital." }
    local reply = ask { model = "any-name", instructions = "Be brief.", metadata = { a = "b" },
      max_output_tokens = 100, temperature = 0.5 }
    assert.equal(200, reply.status, reply.body)
    local r = reply.json
    assert.same({ "response", "completed", "any-name", "Be brief.", "b", 100, 0.5, true },
      { r.object, r.status, r.model, r.instructions, r.metadata.a, r.max_output_tokens,
        r.temperature, r.store })
    assert.same({ "message", "output_text", "Paris is the capital." }, brief(r.output[1]))
    assert.equal("assistant", r.output[1].role)
    assert.equal(r.usage.input_tokens + r.usage.output_tokens, r.usage.total_tokens)
    assert.same({ 0, 0 }, { r.usage.input_tokens_details.cached_tokens,
      r.usage.output_tokens_details.reasoning_tokens })
  end)

  it("goes on from an answer by its id", function()
    server = served.replay { "I think.\n</think>\n\nLet me look.\n\n" .. CALL, "Sunny.", "Bye." }
    local prompts = served.prompts(server)
    local first = ask { tools = { WEATHER }, reasoning = THINK, instructions = "Be brief.",
      input = "How is Paris?" }.json
    local result = { { type = "function_call_output", call_id = first.output[3].call_id,
      output = "18 degrees" } }
    local second = ask { tools = { WEATHER }, reasoning = THINK, input = result,
      previous_response_id = first.id }.json
    assert.equal(first.id, second.previous_response_id)
    local whole = ask { tools = { WEATHER }, reasoning = THINK,
      input = { { role = "user", content = "How is Paris?" }, first.output[1], first.output[2],
        first.output[3], result[1] } }.json
    assert.equal(prompts[3], prompts[2]) -- without the instructions
    assert.is_nil(prompts[2]:find("Be brief.", 1, true))
    assert.equal("Bye.", whole.output[1].content[1].text)
    -- Both branches of a conversation, and a stream, go on.
    local last = assemble((stream { input = "And now?", previous_response_id = second.id }))
    for _, id in ipairs { first.id, second.id, last.id } do
      assert.equal(200, ask({ input = "x", previous_response_id = id }).status)
    end
    local function refused(id)
      local reply = ask { previous_response_id = id }
      assert.same({ 400, "previous_response_not_found", "previous_response_id" },
        { reply.status, reply.json.error.code, reply.json.error.param })
    end
    refused(ask({ store = false }).json.id)
    refused("resp_none")
  end)

  it("keeps only so many answers", function()
    local stored = require "moonlet.server.stored"
    local kept = stored.new()
    for i = 1, 1025 do kept:put("a" .. i, { { role = "user", content = "x" } }) end
    assert.is_nil(kept:get("a1"))
    assert.same({ { role = "user", content = "x" } }, kept:get("a2"))
    local long = ("x"):rep(20 << 20)
    for i = 1, 4 do kept:put("b" .. i, { { role = "user", content = long } }) end
    assert.is_nil(kept:get("b1"))
    assert.is_nil(kept:get("a1025"))
    assert.is_table(kept:get("b2"))
    kept:put("c", { { role = "user", content = long:rep(4) } })
    assert.is_nil(kept:get("c"))
    assert.is_table(kept:get("b4"))
  end)

  it("streams reasoning, text and calls, item by item", function()
    server = served.replay { "I think.\n</think>\n\nLet me look.\n\n" .. CALL }
    local more = { tools = { WEATHER }, reasoning = THINK }
    local events, reply = stream(more)
    assert.equal("text/event-stream; charset=utf-8", reply.fields["content-type"])
    local last, items = assemble(events)
    assert.equal("completed", last.status)
    assert.is_true(last.usage.output_tokens_details.reasoning_tokens > 2)
    local expected = { { "reasoning", "reasoning_text", "I think." },
      { "message", "output_text", "Let me look." },
      { "function_call", "weather", '{"city": "Paris", "days": 3}' } }
    for i, item in ipairs(items) do assert.same(expected[i], brief(item.done)) end
    assert.equal(3, #items)
    assert.is_nil(reply.body:find("[DONE]", 1, true))
    more.reasoning = { effort = "high", summary = "auto" }
    last, items = assemble((stream(more)))
    assert.same({ "reasoning", "summary_text", "I think." }, brief(last.output[1]))
    assert.equal("summary_text", items[1].part)
  end)

  it("says the same streamed and whole, whatever the steps", function()
    local more = { tools = { WEATHER }, reasoning = THINK, include = SEAL }
    local streamed = body_of(more)
    streamed.stream = true
    said.in_all_ways(PATH, body_of(more), streamed, function(name, replies)
      local expected
      for i, reply in ipairs(replies) do
        assert.equal(200, reply.status, name)
        local got = essence(reply.json or assemble(client.events(reply)))
        expected = expected or got
        assert.same(expected, got, ("%s, request %d"):format(name, i))
      end
    end)
  end)

  it("failures 12, 13: what is cut off is incomplete and no call that can be run", function()
    local cut = { text = said.TEXTS["a call cut off"], finish_reason = "length" }
    server = served.replay { cut, { text = "still thinking", finish_reason = "length" } }
    local r = ask { tools = { WEATHER }, reasoning = THINK }.json
    assert.same({ "incomplete", "max_output_tokens", "incomplete", "message" },
      { r.status, r.incomplete_details.reason, r.output[1].status, r.output[1].type })
    assert.same({ "reasoning", "reasoning_text", "still thinking" },
      brief(ask({ reasoning = THINK }).json.output[1]))
    server:close()
    server = served.replay({ cut }, { stream_tool_args = true })
    local last = assemble((stream { tools = { WEATHER }, reasoning = THINK }))
    assert.same({ "incomplete", "function_call", "incomplete" },
      { last.status, last.output[1].type, last.output[1].status })
    assert.is_nil((json.decode(last.output[1].arguments)))
  end)

  it("reads what clients send", function()
    server = served.replay { "ok" }
    local prompts = served.prompts(server)
    local function items_with(reasoning)
      return {
        { role = "developer", content = "Be kind." },
        { type = "message", role = "user", content = { { type = "input_text", text = "One." } } },
        { role = "user", content = "Two." },
        reasoning,
        { type = "message", id = "msg_1", role = "assistant", status = "completed",
          content = { { type = "output_text", text = "Looking.", annotations = json.array {} } } },
        { type = "function_call", id = "fc_1", call_id = "c1", name = "weather",
          arguments = '{"city":"Rome"}' },
        { type = "function_call", call_id = "c2", name = "weather", arguments = '{"city": "Par' },
        { type = "function_call_output", call_id = "c1", output = "Sun." },
        { type = "function_call_output", call_id = "c2",
          output = { { type = "input_text", text = "Rain." } } },
        { role = "developer", content = "Be quick." },
      }
    end
    for _, reasoning in ipairs {
      { type = "reasoning", id = "rs_1", summary = json.array {},
        content = { { type = "reasoning_text", text = "Hm." } } },
      { type = "reasoning", summary = { { type = "summary_text", text = "Hm." } } },
      { type = "reasoning", summary = { { type = "summary_text", text = "Well." } },
        encrypted_content = "moonlet1.SG0u" },
    } do
      local reply = ask { input = items_with(reasoning), instructions = "Be brief.",
        store = false, prompt_cache_key = "k", truncation = "auto", service_tier = "auto",
        tools = { WEATHER, { type = "web_search" }, { type = "namespace", name = "n" } } }
      assert.equal(200, reply.status, reply.body)
      local text = prompts[#prompts]
      assert.matches('\n{"type": "function", "function": {"name": "weather", "description": '
        .. '"Tells the weather.", "parameters": {', text, 1, true)
      assert.is_nil(text:find("web_search", 1, true))
      assert.matches("\n\nBe brief.\n\nBe kind.<|im_end|>\n<|im_start|>user\nOne.\n\nTwo.<|im_end|>"
        .. "\n<|im_start|>assistant\n", text, 1, true)
      assert.matches("Looking.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n"
        .. "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=weather>\n", text, 1,
        true)
      assert.matches("<tool_response>\nSun.\n</tool_response>\n<tool_response>\nRain.\n"
        .. "</tool_response><|im_end|>\n<|im_start|>user\nBe quick.<|im_end|>\n", text, 1, true)
      local items = items_with(reasoning)
      items[#items] = nil
      assert.equal(200, ask({ input = items }).status)
      assert.matches("<think>\nHm.\n</think>\n\nLooking.", prompts[#prompts], 1, true)
    end
  end)

  it("thinks as it is told, and leaves tools to those that were asked for", function()
    server = served.replay { "Just this." }
    assert.equal("message", ask({ reasoning = { effort = "none" } }).json.output[1].type)
    assert.equal("reasoning", ask({ reasoning = { effort = "low" } }).json.output[1].type)
    server:close()
    server = served.replay { CALL .. "\n" .. CALL }
    for _, more in ipairs { { tools = { WEATHER }, tool_choice = "none" }, {} } do
      local none = ask(more).json
      assert.same({ "message", "output_text", CALL .. "\n" .. CALL }, brief(none.output[1]))
    end
    assert.equal(1, #ask({ tools = { WEATHER }, parallel_tool_calls = false }).json.output)
    assert.equal(2, #ask({ tools = { WEATHER } }).json.output)
  end)

  it("refuses what it cannot do, naming the field", function()
    server = served.replay({ "ok" }, { limits = { messages = 2, tools = 1 } })
    local user = { role = "user", content = "x" }
    for _, row in ipairs {
      { "input", { input = json.array {} } },
      { "input", { input = 5 } },
      { "input", { input = { user, user, user } } },
      { "input[0]", { input = { "hi" } } },
      { "input[0].role", { input = { { role = "ghost", content = "x" } } } },
      { "input[0].type", { input = { { type = "item_reference", id = "msg_1" } } } },
      { "input[0].type", { input = { { type = "web_search_call" } } } },
      { "input[0].content[0]", { input = { { role = "user",
        content = { { type = "input_image", image_url = "x" } } } } } },
      { "input[0].name", { input = { { type = "function_call", arguments = "{}" } } } },
      { "previous_response_id", { previous_response_id = "resp_1" } },
      { "conversation", { conversation = "conv_1" } },
      { "background", { background = true } },
      { "prompt", { prompt = { id = "pmpt_1" } } },
      { "include", { include = { "message.output_text.logprobs" } } },
      { "max_output_tokens", { max_output_tokens = 0 } },
      { "temperature", { temperature = "hot" } },
      { "reasoning.effort", { reasoning = { effort = "extreme" } } },
      { "reasoning.summary", { reasoning = { summary = "long" } } },
      { "text.format", { text = { format = { type = "json_object" } } } },
      { "text.format", { text = { format = { type = "json_schema", name = "n",
        schema = json.object {} } } } },
      { "tools", { tools = { WEATHER, WEATHER } } },
      { "tools[0].name", { tools = { { type = "function" } } } },
      { "tool_choice", { tools = { WEATHER }, tool_choice = "required" } },
      { "tool_choice", { tools = { WEATHER },
        tool_choice = { type = "function", name = "weather" } } },
      { "tool_choice", { tools = { WEATHER },
        tool_choice = { type = "function", name = "other" } } },
    } do
      local reply = ask(row[2])
      assert.equal(400, reply.status, row[1] .. reply.body)
      assert.equal(row[1], reply.json.error.param, reply.body)
    end
    assert.matches("constrained decoding", ask { text = { format = { type = "json_object" } } }
      .json.error.message)
  end)

  it("failure 21: says that a prompt is too long, in the words that clients know", function()
    server = served.replay({ "ok" }, { ctx = 32 })
    local reply = ask { input = ("word "):rep(100), truncation = "auto" }
    assert.same({ 400, "context_length_exceeded" }, { reply.status, reply.json.error.code })
    assert.matches("^This model's maximum context length is 32 tokens. However, your request has "
      .. "%d+ input tokens.$", reply.json.error.message)
  end)

  it("ends a stream that fails with a failed response", function()
    server = served.replay { { text = "some", finish_reason = "error", message = "bad weight" } }
    local last = assemble((stream {}))
    assert.same({ "failed", "server_error", "bad weight" },
      { last.status, last.error.code, last.error.message })
    assert.equal(500, ask({}).status)
  end)

  it("failure 16: keeps silent streams alive", function()
    server = served.replay({ { text = CALL, delay_ms = 2 } }, { heartbeat = 0.001 })
    local events = stream { tools = { WEATHER } }
    local comments, repeated = 0, -1
    for _, event in ipairs(events) do
      if event.comment then comments = comments + 1 end
      if event.type == "response.in_progress" then repeated = repeated + 1 end
    end
    assert.is_true(comments >= 1 and repeated >= 1, comments .. " " .. repeated)
    assert.equal("completed", assemble(events).status)
  end)end)

describe("a dialogue over /v1/responses", function()
  local model
  setup(function() model = assert(moonlet.open(served.DIR, { threads = 2 })) end)
  teardown(function() model:close() end)

  -- `follow` is the item that comes after the last one of the i-th answer.
  local function play(said_by_model, options, more, follow)
    local body = body_of(more)
    body.input, body.tools = { { role = "user", content = "Hi" } }, { WEATHER }
    return dialogue.play(model, said_by_model, options, { path = PATH,
      body = body,
      hear = function(reply, i)
        for _, item in ipairs(reply.output) do
          if item.type == "reasoning" then item.content = nil end -- as codex sends it back
          table.insert(body.input, item)
        end
        table.insert(body.input, follow(i, reply.output[#reply.output]))
        local u = reply.usage
        return { prompt = u.input_tokens, cached = u.input_tokens_details.cached_tokens,
          completion = u.output_tokens }
      end })
  end

  it("of tools evaluates each token once, with and without reasoning", function()
    for thought, more in pairs { [""] = { reasoning = { effort = "none" } },
      ["Hm,  so.\n</think>\n\n"] = { reasoning = { effort = "high", summary = "auto" },
        include = SEAL } } do
      local all_found, most_new = play(thought .. dialogue.CALL, {}, more, function(i, call)
        return { type = "function_call_output", call_id = call.call_id, output = "Sun " .. i }
      end)
      assert.is_true(all_found)
      assert.is_true(most_new < 40, most_new)
    end
  end)

  it("of questions evaluates each token once where reasoning is kept, else the last turn twice",
  function()
    for _, kept in ipairs { true, false } do
      local all_found, most_new = play("Hm.\n</think>\n\nIt is so.",
        { template_variables = { preserve_thinking = kept } },
        { reasoning = THINK, include = SEAL },
        function(i) return { role = "user", content = "And " .. i .. "?" } end)
      assert.equal(kept, all_found)
      assert.is_true(most_new < 40, most_new)
    end
  end)
end)
