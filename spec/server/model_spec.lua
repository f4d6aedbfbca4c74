-- The server over the real engine: the demo model answers.

local client = require "spec.support.client"
local generate = require "moonlet.generate"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local served = require "spec.support.served"

local PATH <const> = "/v1/chat/completions"

describe("a served model", function()
  local model, server
  setup(function() model = assert(moonlet.open(served.DIR, { threads = 2 })) end)
  teardown(function() model:close() end)
  after_each(function() server:close() end)

  local function ask(more)
    local reply = client.ask(server, "POST", PATH, more)
    assert.equal(200, reply.status, reply.body)
    return reply.json
  end

  local function user(text) return { { role = "user", content = text } } end

  it("says what the model says", function()
    local messages = user "What is the capital of France?"
    local session <close> = assert(model:session { ctx = 1024 })
    assert(session:sync(model:encode(model:render(messages, { add_generation_prompt = true }))))
    local expected = assert(generate.collect(session, { temperature = 0, max_tokens = 40 }))
    server = served.model(model)
    local r = ask { messages = messages, temperature = 0, max_tokens = 40 }
    assert.equal(expected.text, r.choices[1].message.content)
    assert.equal(#expected.ids, r.usage.completion_tokens)
  end)

  it("draws by the seed, and by the checkpoint's recommendation without options", function()
    server = served.model(model)
    local body = { messages = user "Tell me a story.", seed = 5, max_tokens = 30 }
    local a, b = ask(body), ask(body)
    assert.equal(a.choices[1].message.content, b.choices[1].message.content)
    body.seed = 6
    assert.not_equal(a.choices[1].message.content, ask(body).choices[1].message.content)
    local config = model.generation_config
    body.seed, body.temperature, body.top_k, body.top_p = 5, config.temperature, config.top_k,
      config.top_p
    assert.equal(a.choices[1].message.content, ask(body).choices[1].message.content)
  end)

  it("calls a tool and answers from its result, evaluating each token once", function()
    server = served.model(model)
    local tools = { { type = "function", ["function"] = { name = "get_weather",
      description = "Get the current weather in a city.", parameters = { type = "object",
        properties = { city = { type = "string" } }, required = { "city" } } } } }
    local messages = user "What is the weather in Paris?"
    local first = ask { messages = messages, tools = tools, temperature = 0 }
    assert.equal("tool_calls", first.choices[1].finish_reason)
    local call = first.choices[1].message.tool_calls[1]
    assert.equal("get_weather", call["function"].name)
    -- As clients do: arguments spelled anew.
    local arguments = assert(json.decode(call["function"].arguments))
    call["function"].arguments = json.encode(arguments, { separators = { ",", ":" } })
    messages[2] = first.choices[1].message
    messages[3] = { role = "tool", tool_call_id = call.id, content = "18 degrees, sunny" }
    local second = ask { messages = messages, tools = tools, temperature = 0 }
    assert.equal("stop", second.choices[1].finish_reason)
    assert.equal(first.usage.total_tokens, second.usage.prompt_tokens_details.cached_tokens)
  end)

  it("reads a prompt once for several choices", function()
    server = served.model(model)
    local r = ask { messages = user "Tell me a story about a cat.", n = 3, seed = 1,
      max_tokens = 12 }
    local stats = server.engine.stats
    assert.equal(3, #r.choices)
    assert.equal(2 * r.usage.prompt_tokens, stats.cached_tokens)
    assert.not_equal(r.choices[1].message.content, r.choices[2].message.content)
  end)

  it("ends reasoning within its budget (failure 15: and shows nothing of how)", function()
    server = served.model(model)
    local body = { messages = user "What is 3 + 4?", temperature = 0, enable_thinking = true,
      max_tokens = 80 }
    local free = ask(body)
    assert.is_true(free.usage.completion_tokens_details.reasoning_tokens > 6)
    for _, budget in ipairs { 0, 4 } do
      body.thinking_token_budget = budget
      local r = ask(body)
      local message, n = r.choices[1].message, r.usage.completion_tokens_details.reasoning_tokens
      assert.is_true(n >= budget and n <= budget + 3, n)
      assert.equal(budget == 0, message.reasoning_content == nil)
      assert.is_nil(json.encode(message):find("think>", 1, true))
      assert.not_equal("length", r.choices[1].finish_reason)
      body.stream = true
      local streamed = {}
      for _, event in ipairs(client.events(client.ask(server, "POST", PATH, body))) do
        for name, text in pairs(event.choices and event.choices[1].delta or {}) do
          if type(text) == "string" then streamed[name] = (streamed[name] or "") .. text end
        end
      end
      body.stream = nil
      assert.same({ message.reasoning_content or "",
        message.content ~= json.null and message.content or "" },
        { streamed.reasoning_content or "", streamed.content })
    end
  end)

  it("goes on with a message as if it had been its own, or with none", function()
    server = served.model(model)
    local messages = user "What is the capital of France?"
    local whole = ask { messages = messages, temperature = 0, return_token_ids = true }
    local text = whole.choices[1].message.content
    local head = text:sub(1, text:find(" ", 8, true) - 1)
    messages[2] = { role = "assistant", content = head }
    local body = { messages = messages, temperature = 0, continue_final_message = true,
      return_token_ids = true }
    local rest = ask(body)
    assert.equal(text, head .. rest.choices[1].message.content)
    assert.is_nil(rest.choices[1].message.reasoning_content)
    body.echo = true
    assert.equal(text, ask(body).choices[1].message.content)
    body.stream = true
    local streamed = ""
    for _, event in ipairs(client.events(client.ask(server, "POST", PATH, body))) do
      local choice = event.choices and event.choices[1]
      streamed = streamed .. (choice and choice.delta.content or "")
    end
    assert.equal(text, streamed)
    -- The turn that went on is recognised like any other.
    messages[2] = { role = "assistant", content = text }
    messages[3] = { role = "user", content = "And of Spain?" }
    local next_turn = ask { messages = messages, temperature = 0, max_tokens = 1 }
    assert.equal(whole.usage.total_tokens, next_turn.usage.prompt_tokens_details.cached_tokens)
    local bare = ask { messages = user "Hi", add_generation_prompt = false, max_tokens = 1,
      return_token_ids = true }
    local tokens = client.ask(server, "POST", "/tokenize", { messages = user "Hi",
      add_generation_prompt = false }).json.tokens
    assert.same(model:encode(model:render(user "Hi", { add_generation_prompt = false })),
      setmetatable(tokens, nil))
    assert.same(tokens, setmetatable(bare.prompt_token_ids, nil))
  end)

  it("scores the prompt of a conversation", function()
    server = served.model(model)
    local r = ask { messages = user "Hi", prompt_logprobs = 2, max_tokens = 1,
      return_token_ids = true }
    assert.equal(#r.prompt_token_ids, #r.prompt_logprobs)
    for i = 2, #r.prompt_token_ids do
      local entry = r.prompt_logprobs[i][tostring(r.prompt_token_ids[i])]
      assert.is_true(entry.logprob <= 0 and entry.rank >= 1)
    end
  end)

  it("keeps min_tokens, stop ids and ignore_eos", function()
    server = served.model(model)
    local body = { messages = user "What is the capital of France?", temperature = 0 }
    local free = ask(body)
    body.min_tokens = free.usage.completion_tokens + 5
    assert.is_true(ask(body).usage.completion_tokens >= body.min_tokens)
    body.min_tokens, body.ignore_eos, body.max_tokens = nil, true, 30
    local long = ask(body)
    assert.same({ 30, "length" }, { long.usage.completion_tokens, long.choices[1].finish_reason })
    body.ignore_eos, body.return_token_ids = nil, true
    body.stop_token_ids = { ask(body).choices[1].token_ids[3] }
    local cut = ask(body)
    assert.same({ 2, "stop", body.stop_token_ids[1] }, { cut.usage.completion_tokens,
      cut.choices[1].finish_reason, cut.choices[1].stop_reason })
  end)

  -- How clients leave. Programs that end close their connections (FIN); some reset them (RST), as
  -- does the system of one that has not read everything.
  local LEAVINGS <const> = { FIN = "exit", RST = [[exec perl -MSocket -e '
    open(my $s, "+<&=3") or die;
    setsockopt($s, SOL_SOCKET, SO_LINGER, pack("ii", 1, 0)) or die']] }

  -- Batches begun between a client's leaving, when `is_time(engine)`, and nothing being worked on.
  -- From then on none begins before the server knows.
  local function batches_after_leaving(leave, body, is_time, path)
    local engine, gone, go = server.engine, server.loop.on_gone, os.tmpname()
    os.remove(go)
    local is_told, at_leaving
    server.loop.on_gone = function(request)
      at_leaving = engine.stats.batches
      gone(request)
    end
    engine.model = setmetatable({ start = function(_, parts)
      if not is_told and is_time(engine) then
        is_told = io.open(go, "w"):close()
      end
      while is_told and not at_leaving do server.loop:sleep(0.001) end
      return model:start(parts)
    end }, { __index = model })
    local c = client.start(server.port,
      ('cat "$0.in" >&3; while [ ! -e %s ]; do sleep 0.01; done; '):format(go) .. leave,
      client.bytes("POST", path or PATH, body))
    server.loop:spawn(function()
      while not at_leaving do server.loop:sleep(0.001) end
      engine:drain()
      while next(server.exchanges) do server.loop:sleep(0.001) end
      server.loop:stop()
    end)
    assert(server:run())
    while not c.is_done() do os.execute("sleep 0.02") end
    assert.equal("", c.output())
    os.remove(go)
    engine.model, server.loop.on_gone = model, gone
    return engine.stats.batches - at_leaving
  end

  local function generates(engine) return engine.stats.generated_tokens >= 3 end
  local function reads(engine)
    local ticket = engine.active[1]
    return ticket and ticket.evaluated >= 64
  end

  for how, leave in pairs(LEAVINGS) do
    it("frees the engine when a client leaves, and keeps what was read: " .. how, function()
      local logged = {}
      server = served.model(model, { ctx = 4096,
        log = function(text) logged[#logged + 1] = text end })
      local long = user(("The cat sat on the mat. "):rep(300))
      for _, case in ipairs {
        { { messages = user "Tell me a story.", ignore_eos = true }, generates },
        { { messages = user "Tell me a story.", ignore_eos = true, stream = true }, generates },
        { { messages = user "Tell me a story.", ignore_eos = true, stream = true }, generates,
          "/v1/messages" },
        { { input = "Tell me a story.", ignore_eos = true, stream = true }, generates,
          "/v1/responses" },
        { { messages = long, stream = true }, reads },
        { { input = long[1].content }, reads, "/v1/embeddings" },
        { { prompt = long[1].content, echo = true, logprobs = 3, max_tokens = 0 }, reads,
          "/v1/completions" },
      } do
        server.engine.stats.generated_tokens = 0
        assert.is_true(batches_after_leaving(leave, table.unpack(case)) <= 1)
        assert.same({}, server.exchanges)
      end
      local again = ask { messages = long, max_tokens = 1 }
      assert.is_true(again.usage.prompt_tokens_details.cached_tokens >= 64)
      assert.same({}, logged)
    end)
  end

  it("forgets requests whose clients reset the connection before they are whole", function()
    local logged, statuses = {}, {}
    server = served.model(model, { log = function(text) logged[#logged + 1] = text end,
      on_served = function(exchange) statuses[#statuses + 1] = exchange.status end })
    local body = { messages = user "Hi", max_tokens = 1 }
    local bytes = client.bytes("POST", PATH, body, { Expect = "100-continue" })
    local head = bytes:find("\r\n\r\n", 1, true) + 3
    for n = 1, #bytes - 1, 7 do
      -- Behind the head the rest comes once that was read.
      local script = n > head and ('head -c %d "$0.in" >&3; head -c 12 <&3 >/dev/null; '
        .. 'tail -c +%d "$0.in" >&3; '):format(head, head + 1) or 'cat "$0.in" >&3; '
      local c = client.start(server.port, script .. LEAVINGS.RST, bytes:sub(1, n))
      client.wait(server, { c })
      assert.equal("", c.output())
    end
    assert.same({}, statuses)
    ask(body)
    assert.same({ 200 }, statuses)
    assert.same({}, logged)
    server.loop:spawn(function()
      while server.loop.net:n_connections() > 0 do server.loop:sleep(0.001) end
      server.loop:stop()
    end)
    assert(server:run())
  end)

  it("ends what was begun for a request that fails", function()
    local logged
    server = served.model(model, { ctx = 4096, log = function(text) logged = text end })
    function server.engine.score() error("broken on purpose", 0) end
    for _, case in ipairs {
      { "/v1/completions", { prompt = "Once", prompt_logprobs = 1, max_tokens = 4000 } },
      { "/v1/completions", { prompt = "Once", prompt_logprobs = 1, max_tokens = 4000,
        stream = true } },
      { PATH, { messages = user "Once", prompt_logprobs = 1, max_tokens = 4000 } },
    } do
      case[2].ignore_eos, logged = true, nil
      local reply = client.ask(server, "POST", case[1], case[2])
      assert.equal(case[2].stream and 200 or 500, reply.status)
      assert.matches("internal error", reply.body)
      assert.matches("broken on purpose", logged)
    end
    server.loop:spawn(function()
      server.engine:drain()
      server.loop:stop()
    end)
    assert(server:run())
    assert.is_true(server.engine.stats.generated_tokens < 4000)
  end)

  it("lets go of nothing that was begun when it is told to end", function()
    server = served.model(model)
    local body = { messages = user "Tell me a story.", seed = 1, max_tokens = 40, stream = true }
    local c = client.send(server, "POST", PATH, body)
    local refused
    server.loop:spawn(function()
      while not next(server.exchanges) do server.loop:sleep(0.001) end
      server.loop:spawn(function() server:shutdown() end)
      server.loop:sleep(0.01)
      refused = client.start(server.port, "true")
    end)
    assert(server:run())
    while not (c.is_done() and refused.is_done()) do os.execute("sleep 0.02") end
    local events = client.events(client.parse(c.output()))
    assert.equal("[DONE]", events[#events])
    assert.matches("refused", refused.output())
  end)
end)
