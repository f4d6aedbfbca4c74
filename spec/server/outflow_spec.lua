-- Long replies: whole, however long, and no more of them waits than a client is about to take.

local client = require "spec.support.client"
local events_of = require "moonlet.server.events"
local json = require "moonlet.json"
local served = require "spec.support.served"

-- Less may wait for a client than one of these.
local LONG <const>, LIMITS <const> = ("x"):rep(600000), { pending_bytes = 1 << 18 }
local HELLO <const> = { messages = { { role = "user", content = "Hi" } } }

describe("a long reply of the server", function()
  local server
  after_each(function() server:close() end)

  local function with_answers(text)
    server = served.replay({ "x" }, { limits = LIMITS, hooks = { on_response = function(message)
      message.content = text
    end } })
  end

  it("may be one that repeats what the request says", function()
    server = served.replay({ "x" }, { limits = LIMITS })
    local given = { input = "hi", stream = true, metadata = { a = LONG } }
    local events = client.events(client.ask(server, "POST", "/v1/responses", given))
    assert.equal("response.completed", events[#events].type)
    assert.is_true(events[#events].response.metadata.a == LONG)
    given.stream = false
    local reply = client.ask(server, "POST", "/v1/responses", given)
    assert.is_true(reply.json.metadata.a == LONG)
  end)

  it("may be what a hook makes of one", function()
    with_answers(LONG)
    for path, given in pairs { ["/v1/chat/completions"] = HELLO,
      ["/v1/completions"] = { prompt = "Hi" }, ["/v1/responses"] = { input = "Hi" } } do
      for _, stream in ipairs { false, true } do
        local body = json.decode(json.encode(given))
        body.stream = stream
        local reply = client.ask(server, "POST", path, body)
        assert.equal(200, reply.status)
        assert.is_truthy(reply.body:find(LONG, 1, true))
        if stream then
          local events = client.events(reply)
          local last = events[#events]
          assert.is_true(last == "[DONE]" or last.type == "response.completed")
        end
      end
    end
  end)

  it("waits for a client that does not read, and then arrives in one piece", function()
    local longer = LONG:rep(6) -- than what the system takes of three
    with_answers(longer)
    local mark = os.tmpname()
    os.remove(mark)
    local most, n_comments = 0, 0
    for _, stream in ipairs { false, true } do
      local c = client.start(server.port, 'cat "$0.in" >&3; until [ -e ' .. mark
        .. " ]; do sleep 0.01; done; cat <&3", client.bytes("POST", "/v1/chat/completions",
        { messages = HELLO.messages, stream = stream, n = 3 }))
      server.loop:spawn(function()
        local request, exchange
        while not (request and request:pending() > 0) do
          request, exchange = next(server.exchanges)
          server.loop:sleep(0.001)
        end
        for _ = 1, 50 do
          most = math.max(most, request:pending())
          if exchange.stream then exchange.stream:comment() end
          server.loop:sleep(0.001)
        end
        assert(io.open(mark, "w")):close()
      end)
      client.wait(server, { c })
      local reply = client.parse(c.output())
      os.remove(mark)
      local n = 0
      for _ in reply.body:gmatch(longer) do n = n + 1 end
      assert.equal(3, n)
      if stream then
        for _, event in ipairs(client.events(reply)) do
          n_comments = n_comments + (event.comment and 1 or 0)
        end
      end
    end
    assert.is_true(most > 0 and most < 1 << 20)
    assert.equal(0, n_comments)
  end)

  it("is not waited for by who only asks whether its client is there", function()
    server = served.replay { "x" }
    local n_written, request = 0, { start = function() end }
    function request.pending() return 1 << 20 end
    function request.write()
      n_written = n_written + 1
      return true
    end
    local stream = events_of.start(request, {}, error, server.loop)
    stream:comment() -- outside of the loop, where waiting raises
    assert.equal(1, n_written)
  end)

  it("has no end where it lacks something, and the log says so", function()
    local said, logged, cut = {}, {}, nil
    server = served.replay({ "x" }, { log = function(text) logged[#logged + 1] = text end,
      on_served = function(exchange) cut = exchange.is_cut end })
    server.loop.on_request = (function(serve)
      return function(request)
        local shown = setmetatable({}, { __index = function(_, name)
          return function(_, ...) return request[name](request, ...) end
        end })
        function shown.write(_, text)
          said[#said + 1] = text
          if #said == 2 then return nil, "out of memory for a reply", "memory" end
          return request:write(text)
        end
        serve(shown)
      end
    end)(server.loop.on_request)
    local c = client.start(server.port, 'cat "$0.in" >&3; cat <&3',
      client.bytes("POST", "/v1/chat/completions", { messages = HELLO.messages, stream = true }))
    client.wait(server, { c })
    assert.is_nil(c.output():find("\r\n0\r\n", 1, true)) -- the last chunk
    assert.same({ "POST /v1/chat/completions: the reply is cut: out of memory for a reply" },
      logged)
    assert.is_true(cut)
  end)
end)
