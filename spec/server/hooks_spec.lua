-- Hooks and policies of a server.

local client = require "spec.support.client"
local hooks = require "moonlet.server.hooks"
local moonlet = require "moonlet"
local said = require "spec.support.said"
local served = require "spec.support.served"
local workspace = require "spec.support.workspace"

local CHAT <const>, TEXT <const> = "/v1/chat/completions", "/v1/completions"

local function body(more)
  local b = { messages = { { role = "user", content = "Hello" } } }
  for name, value in pairs(more or {}) do b[name] = value end
  return b
end

local CALL <const> = said.call("bash", { command = "ls" })
local TOOLS <const> = { { type = "function", ["function"] = { name = "bash",
  parameters = { type = "object", properties = { command = { type = "string" } } } } } }

describe("hooks of a server", function()
  local server, log
  before_each(function() log = {} end)
  after_each(function() server:close() end)

  local function serve(given, answers)
    server = served.replay(answers or { "One two three." },
      { hooks = given, log = function(text) log[#log + 1] = text end })
  end

  local function ask(more, path)
    return client.ask(server, "POST", path or CHAT, body(more))
  end

  local function text_of(reply) return reply.json.choices[1].message.content end

  local function streamed(more)
    local options = { stream = true }
    for name, value in pairs(more or {}) do options[name] = value end
    local events, text, reason = client.events(ask(options)), "", nil
    for _, event in ipairs(events) do
      local choice = type(event) == "table" and event.choices and event.choices[1]
      text = text .. (choice and choice.delta.content or "")
      reason = choice and choice.finish_reason or reason
    end
    return text, reason, events
  end

  it("are as docs/server.md shows them: wrong types are the request's fault, not theirs", function()
    local file = assert(io.open("docs/server.md"))
    local example = file:read("a"):match("```lua\n(return {\n  on_request.-\n)```")
    file:close()
    local given = assert(load(example))()
    given.policies = nil
    serve(given)
    for field, value in pairs { temperature = "hot", messages = 5 } do
      local reply = ask { [field] = value }
      assert.same({ 400, field }, { reply.status, reply.json.error.param })
    end
    assert.equal(200, ask { temperature = 3 }.status) -- above 2, were it not for the hook
    local long = {}
    for i = 1, 101 do long[i] = { role = "user", content = "Hello" } end
    assert.equal("start a new conversation", ask { messages = long }.json.error.message)
  end)

  it("may change a request, or answer with another", function()
    local paths = {}
    serve { on_request = function(request, path)
      paths[#paths + 1] = path
      request.max_tokens = 2
    end }
    assert.equal("length", ask().json.choices[1].finish_reason)
    server:close()
    serve { on_request = function() return body { n = 2 } end }
    assert.equal(2, #ask().json.choices)
    assert.same({ CHAT }, paths)
  end)

  it("end their request when they never end, or give way to nobody", function()
    for problem, given in pairs {
      ["hook on_request: runs too long: more than %d+ instructions$"] = { on_request = function()
        while true do pcall(string.rep, "x", 10) end
      end },
      ["hook on_request: runs too long: more than"] = { on_request = function()
        local function spin() while true do end end
        xpcall(spin, spin)
        pcall(coroutine.wrap(function() xpcall(spin, spin) end))
      end },
      ["hook on_request: [^\n]*runs too long"] = { on_request = function()
        local function spin() repeat until false end
        while true do pcall(coroutine.wrap(function() coroutine.wrap(spin)() end)) end
      end },
      ["hook on_request: coroutine.yield: nobody would go on"] = { on_request = function()
        coroutine.yield()
      end },
      ["hook on_token: coroutine.yield"] = { on_token = function() coroutine.yield("stop") end },
      ["hook on_response: runs too long"] = { on_response = function() repeat until false end },
    } do
      serve(given)
      local reply = ask()
      assert.same({ 422, "hook_failed" }, { reply.status, reply.json.error.code })
      assert.matches("^" .. problem, log[#log])
      server:close()
    end
    local function numbers() coroutine.yield(1) end
    serve { on_request = function(request) request.n = coroutine.wrap(numbers)() end }
    assert.equal(200, ask().status) -- its own coroutines are its own
  end)

  it("are named with what is wrong in what they make", function()
    local function answer(change)
      return { on_response = change }
    end
    for problem, given in pairs {
      ["on_request: what it makes of a request is no JSON: a text that is not UTF-8"] = {
        on_request = function(request) request.messages[1].content = "\xff" end },
      ["on_request: what it makes of a request is no JSON: a key that is not UTF-8"] = {
        on_request = function(request) request["\xff"] = 1 end },
      ['on_request: {"code": 5}'] = { on_request = function() error { code = 5 } end },
      ["like what it returned: content: a text expected"] = answer(function(message)
        message.content = 5
      end),
      ["like what it returned: calls: a list expected"] = answer(function(message)
        message.calls = { a = 1 }
      end),
      ["like what it returned: calls[1].id: a text expected"] = answer(function(message)
        message.calls = { { name = "f", arguments = {} } }
      end),
      ["like what it returned: calls[1].arguments: a table by names expected"] = answer(
        function(message) message.calls = { { id = "1", name = "f", arguments = "{}" } } end),
    } do
      serve(given)
      assert.equal(422, ask().status)
      assert.matches(problem, log[#log], 1, true)
      server:close()
    end
    serve {}
  end)

  it("end in what coroutines of theirs close", function()
    local escaped = false
    serve { on_request = function()
      coroutine.wrap(function()
        local held <close> = setmetatable({}, { __close = function()
          for _ = 1, 1000000 do end
          escaped = true
        end })
        repeat until not held
      end)()
    end }
    assert.equal(422, ask().status)
    assert.is_false(escaped)
  end)

  it("may refuse a request", function()
    serve { on_request = function(request)
      if request.messages then return nil, "not on Sundays" end
    end }
    local reply = ask()
    assert.equal(400, reply.status)
    assert.equal("not on Sundays", reply.json.error.message)
    assert.equal(200, client.ask(server, "POST", TEXT, { prompt = "x" }).status)
  end)

  it("may end an answer in front of a token", function()
    serve { on_token = function(token, request)
      assert(request.messages and math.type(token.id) == "integer")
      if token.text:find("three") then return "stop" end
    end }
    local reply = ask()
    assert.equal("One two", text_of(reply))
    assert.equal("stop", reply.json.choices[1].finish_reason)
    assert.equal("on_token", reply.json.choices[1].stop_reason)
    local text, reason = streamed()
    assert.same({ "One two", "stop" }, { text, reason })
  end)

  it("may say nothing else of a token", function()
    for value, shown in pairs { [7] = "number", [true] = "boolean", go = "string" } do
      serve { on_token = function() return value end }
      local reply = ask()
      assert.same({ 422, "the server's hook on_token failed" },
        { reply.status, reply.json.error.message })
      assert.equal('hook on_token: "stop" or nothing expected, got ' .. shown, log[#log])
      server:close()
    end
    serve { on_token = function() return false end }
    assert.equal("One two three.", text_of(ask()))
  end)

  it("may edit an answer, which is then shown when it is complete", function()
    serve({ on_response = function(message, request)
      assert(request.messages or request.prompt)
      message.content = message.content:upper() .. " " .. message.finish_reason
    end })
    assert.equal("ONE TWO THREE. stop", text_of(ask()))
    local text, reason, events = streamed()
    assert.equal("ONE TWO THREE. stop", text)
    assert.equal("stop", reason)
    assert.equal(4, #events) -- the role, all of the text, the reason, the end
    local reply = client.ask(server, "POST", TEXT, { prompt = "x" })
    assert.equal("ONE TWO THREE. stop", reply.json.choices[1].text)
  end)

  it("may edit reasoning and calls", function()
    serve({ on_response = function(message)
      for _, call in ipairs(message.calls) do
        call.arguments.command = call.arguments.command .. " -l"
      end
      if #message.calls == 0 then
        message.content = message.reasoning
        message.reasoning = nil
        message.calls = { { id = "call_x", name = "bash", arguments = { command = "pwd" } } }
      end
    end }, { CALL, "<think>\nHm.\n</think>\n\nNo." })
    local message = ask({ tools = TOOLS }).json.choices[1].message
    assert.equal('{"command": "ls -l"}', message.tool_calls[1]["function"].arguments)
    local choice = ask({ tools = TOOLS }).json.choices[1]
    assert.equal("Hm.", choice.message.content)
    assert.is_nil(choice.message.reasoning_content)
    assert.equal("call_x", choice.message.tool_calls[1].id)
    assert.equal("tool_calls", choice.finish_reason)
  end)

  it("may refuse an answer", function()
    serve { on_response = function() return nil, "nothing to say" end }
    assert.same({ 400, "nothing to say" }, { ask().status, ask().json.error.message })
    local _, _, events = streamed()
    assert.equal("nothing to say", events[#events - 1].error.message)
  end)

  it("that fail end their request clearly, and nothing else", function()
    for _, name in ipairs { "on_request", "on_token", "on_response" } do
      local broken = { function() error("secret bug") end, function() return 3 end }
      for i, fn in ipairs(name == "on_token" and { broken[1] } or broken) do
        local is_broken = true
        serve { [name] = function(...) if is_broken then return fn(...) end end }
        local reply = ask()
        assert.equal(422, reply.status, name .. i)
        assert.equal(("the server's hook %s failed"):format(name), reply.json.error.message)
        assert.equal("hook_failed", reply.json.error.code)
        assert.matches(i == 1 and "secret bug" or "a table expected, got number", log[#log])
        assert.not_matches("\n", log[#log])
        if name ~= "on_request" then
          local _, _, events = streamed()
          assert.equal("hook_failed", events[#events - 1].error.code)
          assert.equal("[DONE]", events[#events])
        end
        is_broken = false
        assert.equal("One two three.", text_of(ask()))
        server:close()
      end
    end
    serve {}
  end)

  it("see the other dialects alike", function()
    local dialects = {
      ["/v1/messages"] = { { messages = { { role = "user", content = "Hi" } }, max_tokens = 50 },
        function(reply) return reply.content[1].text end, "event: error" },
      ["/v1/responses"] = { { input = "Hi" },
        function(reply) return reply.output[1].content[1].text end, "response.failed" },
    }
    for expected, dialect in pairs(dialects) do
      local broken, request = false, dialect[1]
      serve { on_request = function(given, path)
        assert.equal(expected, path)
        given.metadata = { user_id = "me" }
      end, on_response = function(message, given)
        if broken then error("bug") end
        message.content = message.content .. " " .. given.metadata.user_id
      end }
      local function post(stream)
        request.model, request.stream = "m", stream
        return client.ask(server, "POST", expected, request)
      end
      assert.equal("One two three. me", dialect[2](post().json))
      assert.matches("One two three. me", post(true).body, 1, true)
      broken = true
      local reply = post()
      assert.same({ 422, "the server's hook on_response failed" },
        { reply.status, reply.json.error.message })
      assert.matches(dialect[3], post(true).body, 1, true)
      server:close()
    end
    serve {}
  end)

  it("may not make what is no message", function()
    local function with(arguments)
      return { calls = { { id = "a", name = "bash", arguments = arguments } } }
    end
    local cycle = {}
    cycle[1] = cycle
    for _, change in ipairs { { content = 3 }, { reasoning = {} }, { calls = "x" },
      { calls = { { name = "bash" } } }, { calls = with({}).calls[1] }, with { f = print },
      with { n = 1 / 0 }, with { cycle = cycle }, with { 1, 2 }, with { 1, a = 2 },
      setmetatable({}, { __index = function() error("bug") end }) } do
      serve { on_response = function() return change end }
      for _, path in ipairs { CHAT, "/v1/messages" } do
        assert.equal(422, ask({ max_tokens = 50 }, path).status)
        assert.matches("hook on_response: no message is like what it returned", log[#log])
      end
      server:close()
    end
    serve { on_response = function() return with {} end }
    assert.equal("{}", ask().json.choices[1].message.tool_calls[1]["function"].arguments)
  end)

  it("may not make what is no request", function()
    local cycle, wide = {}, {}
    cycle.x = cycle
    for _ = 1, 50 do wide = { wide, wide } end
    local raising = { __index = function() error("bug") end, __pairs = function() error("bug") end,
      __len = function() while true do end end }
    for expected, change in pairs {
      ["a table with a metatable"] = setmetatable({}, raising),
      ["more than 100 levels"] = body { chat_template_kwargs = cycle },
      ["more than %d+ values"] = body { chat_template_kwargs = wide },
      ["a function"] = body { chat_template_kwargs = { f = print } },
      ["a number that is not finite"] = body { temperature = 1 / 0 },
      ["keys of several kinds"] = body { user = { 1, a = 2 } },
    } do
      serve { on_request = function() return change end }
      local reply = ask()
      assert.same({ 422, "hook_failed" }, { reply.status, reply.json.error.code })
      assert.matches("^hook on_request: what it makes of a request is no JSON: .*" .. expected,
        log[#log])
      server:close()
    end
    serve { on_request = function() return false end }
    assert.equal(422, ask().status)
    assert.equal("hook on_request: a table expected, got boolean", log[#log])
  end)

  it("are shown tokens, not the engine's own", function()
    serve { on_token = function(token)
      token.id, token.text, token.logprob = "x", 5, {}
    end }
    local reply = ask { logprobs = true, return_token_ids = true }
    assert.equal("One two three.", text_of(reply))
    assert.equal("integer", math.type(reply.json.choices[1].token_ids[1]))
  end)

  it("fail with one line, whatever they raise or give as a reason", function()
    local mute = setmetatable({}, { __tostring = function() repeat until false end })
    for _, name in ipairs { "on_request", "on_response" } do
      for expected, fn in pairs { ["a text as reason expected, got table"] = function()
        return nil, {}
      end, ["an error that is a table"] = function() error(mute) end } do
        serve { [name] = fn }
        local reply = ask()
        assert.same({ 422, "hook_failed" }, { reply.status, reply.json.error.code })
        assert.equal(("hook %s: %s"):format(name, expected), log[#log])
        server:close()
      end
    end
    serve {}
  end)

  it("are known by name", function()
    serve {}
    assert.has_error(function()
      moonlet.serve { model = served.DIR, hooks = { on_reqest = print } }
    end)
    assert.has_error(function()
      moonlet.serve { model = served.DIR, hooks = { on_request = "x" } }
    end)
  end)
end)

describe("policies of a server", function()
  local model
  setup(function() model = assert(moonlet.open(served.DIR)) end)
  teardown(function() model:close() end)

  local QUESTION <const> = { messages = { { role = "user",
    content = "What is the capital of France?" } }, max_tokens = 20 }

  local function serve(policies, log)
    return served.model(model, { policies = policies, log = log, name = "demo" })
  end

  local function ask(server, more)
    local request = {}
    for name, value in pairs(QUESTION) do request[name] = value end
    for name, value in pairs(more) do request[name] = value end
    return client.ask(server, "POST", CHAT, request)
  end

  local function text_of(reply) return reply.json.choices[1].message.content end

  it("are chosen by field or by the model's name", function()
    local paris = model:encode(" Paris")[1]
    local server <close> = serve {
      greedy = { temperature = 0 },
      elsewhere = { function(c) c:bias { [paris] = -1e9 } end, { "temperature", 0 } },
      asked = function(request) return { temperature = 0, logit_bias = request.bias } end,
    }
    local best = text_of(ask(server, { policy = "greedy" }))
    assert.matches("Paris", best)
    assert.equal(best, text_of(ask(server, { model = "demo@greedy" })))
    assert.equal(best, text_of(ask(server, { policy = "asked" })))
    local other = text_of(ask(server, { policy = "elsewhere" }))
    assert.not_matches("Paris", other)
    assert.equal(other, text_of(ask(server, { model = "x@elsewhere" })))
    -- What a request says itself comes before what a policy says.
    assert.equal(other, text_of(ask(server, { policy = "greedy",
      logit_bias = { [("%d"):format(paris)] = -1e9 } })))
    local ids = {}
    local list = client.ask(server, "GET", "/v1/models").json.data
    for i, entry in ipairs(list) do ids[i] = entry.id end
    assert.same({ "demo", "demo@asked", "demo@elsewhere", "demo@greedy" }, ids)
    assert.equal(200, client.ask(server, "GET", "/v1/models/demo@greedy").status)
    assert.equal(404, client.ask(server, "GET", "/v1/models/demo@none").status)
  end)

  it("that are unknown or fail are answered", function()
    local log = {}
    local server <close> = serve({ broken = function() error("bug") end,
      wrong = function() return { temprature = 1 } end, nothing = function() end,
      raising = function()
        return setmetatable({}, { __len = function() error("bug") end })
      end },
      function(text) log[#log + 1] = text end)
    local reply = ask(server, { policy = "none" })
    local no_such = 'policy: there is no "%s" here; there are broken, nothing, raising, wrong'
    assert.same({ 400, "policy", no_such:format("none") },
      { reply.status, reply.json.error.param, reply.json.error.message })
    for _, name in ipairs { "none", "" } do
      reply = ask(server, { model = "demo@" .. name })
      assert.same({ 400, no_such:format(name) }, { reply.status, reply.json.error.message })
    end
    assert.equal(400, ask(server, { policy = 3 }).status)
    for _, name in ipairs { "broken", "wrong", "nothing", "raising" } do
      reply = ask(server, { policy = name })
      assert.same({ 422, ("the server's policy '%s' failed"):format(name) },
        { reply.status, reply.json.error.message })
    end
    assert.equal(4, #log)
  end)

  it("are none where the operator has given none", function()
    local server <close> = serve {}
    assert.equal(200, ask(server, { model = "mail@example.org", temperature = 0 }).status)
    local reply = ask(server, { policy = "greedy" })
    assert.same({ 400, 'policy: there is no "greedy" here; the server has none' },
      { reply.status, reply.json.error.message })
  end)

  it("whose stages give way or never end do so too", function()
    local log = {}
    local server <close> = serve({ yields = { function() coroutine.yield() end },
      spins = { { apply = function() while true do end end } },
      wraps = { function() coroutine.wrap(function() while true do end end)() end },
      makes = function() return coroutine.wrap(function() repeat until false end)() end,
      asks = function() coroutine.yield() end },
      function(text) log[#log + 1] = text end)
    for name, problem in pairs { yields = "coroutine.yield: nobody", spins = "runs too long",
      wraps = "runs too long", makes = "runs too long", asks = "coroutine.yield: nobody" } do
      assert.equal(422, ask(server, { policy = name }).status)
      assert.matches(problem, log[#log])
    end
    assert.equal(200, ask(server, { temperature = 0 }).status)
  end)

  it("whose stages raise or leave nothing end their request only", function()
    local log = {}
    local server <close> = serve({ raises = { function() error("bug") end },
      empty = { function(c) c:filter(function() return false end) end } },
      function(text) log[#log + 1] = text end)
    for name, problem in pairs { raises = ": bug$", empty = "no candidate is left$" } do
      for _, streams in ipairs { false, true } do
        local reply = ask(server, { policy = name, stream = streams })
        assert.equal(streams and 200 or 422, reply.status)
        assert.matches(("the server's policy '%s' failed"):format(name), reply.body, 1, true)
        assert.matches('"hook_failed"', reply.body)
        assert.matches(("^policy '%s': "):format(name), log[#log])
        assert.matches(problem, log[#log])
      end
    end
    assert.equal(4, #log)
    assert.equal(200, ask(server, { temperature = 0 }).status)
  end)

  it("name tokens that there are", function()
    for _, spec in ipairs { { logit_bias = { [999999] = 1 } },
      { { "logit_bias", { [999999] = 1 } } } } do
      local server, message = moonlet.serve { model = model, port = 0, policies = { x = spec } }
      assert.is_nil(server)
      assert.matches("^policy 'x': logit_bias: 999999 is not a token id %(0 to %d+%)$", message)
    end
    serve({ x = { logit_bias = { [5] = 1 } } }):close()
  end)

  it("are checked when a server is opened", function()
    for _, policies in ipairs { { x = 3 }, { x = { temprature = 1 } }, { x = { { "no_stage" } } },
      { ["a b"] = {} }, { {} } } do
      assert.has_error(function() serve(policies) end)
    end
  end)
end)

describe("a file of hooks", function()
  local place
  before_each(function() place = workspace.new() end)
  after_each(function() place.remove() end)

  it("returns hooks and policies", function()
    place.write("h.lua", [[return { on_token = function() end, policies = { a = {} } }]])
    local given, policies = assert(hooks.read(place.path "h.lua"))
    assert.equal("function", type(given.on_token))
    assert.is_nil(given.policies)
    assert.same({ a = {} }, policies)
  end)

  it("may keep a coroutine, which is counted where it goes on", function()
    place.write("h.lua", [[
      local n_seen = coroutine.wrap(function()
        for n = 1, 2 do coroutine.yield(n) end
        while true do end
      end)
      return { on_request = function(request) request.max_tokens = n_seen() end }]])
    local log = {}
    local server <close> = served.replay({ "One two three." }, {
      hooks = assert(hooks.read(place.path "h.lua")),
      log = function(text) log[#log + 1] = text end })
    for _, status in ipairs { 200, 200, 422 } do
      assert.equal(status, client.ask(server, "POST", CHAT, body()).status)
    end
    assert.matches("^hook on_request: [^\n]*runs too long[^\n]*$", log[1])
  end)

  it("is refused with one line that names it", function()
    for text, pattern in pairs {
      ["return {"] = "h.lua:1:", ["error('bug')"] = "h.lua:1: bug",
      ["return 3"] = "h.lua: does not return a table",
      ["error({})"] = "h.lua: {}", ["\27Lua"] = "h.lua: attempt to load a binary chunk",
      ["return { on_tokens = print }"] = "h.lua: unknown option 'on_tokens'",
      ["return { policies = 3 }"] = "h.lua: policies: a table expected",
      ["return { policies = { a = 3 } }"] = "h.lua: policy 'a': options, stages or a function",
    } do
      place.write("h.lua", text)
      local given, message, code = hooks.read(place.path "h.lua")
      assert.is_nil(given)
      assert.matches("^hooks: .*" .. pattern, message)
      assert.not_matches("\n", message)
      assert.equal("format", code)
    end
    assert.is_nil(hooks.read(place.path "none.lua"))
  end)
end)
