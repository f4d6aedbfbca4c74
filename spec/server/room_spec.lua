-- What requests take in memory is bounded, and is let go.

local client = require "spec.support.client"
local served = require "spec.support.served"

local PATH <const> = "/v1/chat/completions"

local function body(n)
  return ('{"messages": [{"role": "user", "content": "Hi"}], "junk": [%s{}]}'):format(
    ("{},"):rep(n))
end

describe("the memory of a server's requests", function()
  local server
  after_each(function() server:close() end)

  local function run_until(is_so)
    server.loop:spawn(function()
      while not is_so() do server.loop:sleep(0.001) end
      server.loop:stop()
    end)
    assert(server.loop:run())
  end

  -- A request that is worked on from then on.
  local function begin(text)
    local c = client.send(server, "POST", PATH, text)
    run_until(function() return server.engine:load() > 0 end)
    return c
  end

  local function end_it(c)
    local _, exchange = next(server.exchanges)
    exchange:gone()
    client.wait(server, { c })
    c.output()
  end

  it("has an end, behind which they are sent away for a while", function()
    server = served.replay({ { text = "never", prefill_ms = 1e8 }, "x" },
      { limits = { decoded_bytes = 1 << 20 } })
    local c = begin(body(20000))
    for _, path in ipairs { PATH, "/v1/messages", "/tokenize" } do
      local reply = client.ask(server, "POST", path, body(0))
      assert.equal(503, reply.status)
      assert.matches("^%d+$", reply.fields["retry-after"])
    end
    assert.equal(200, client.ask(server, "GET", "/health").status)
    end_it(c)
    assert.equal(0, server.room.taken)
    run_until(function() return server.engine:load() == 0 end) -- also in the middle of a prompt
    assert.equal(200, client.ask(server, "POST", PATH, body(0)).status)
  end)

  it("is not taken for those that the queue has no place for", function()
    server = served.replay({ "never" }, { queue = 0 })
    function server.room.decode() error("was read") end
    for _, path in ipairs { PATH, "/v1/completions", "/v1/embeddings", "/v1/messages",
      "/v1/responses" } do
      assert.equal(429, client.ask(server, "POST", path, body(0)).status)
    end
  end)

  it("holds bodies only where an operator's functions see them", function()
    for _, sees in ipairs { false, true } do
      local seen = setmetatable({}, { __mode = "v" })
      server = served.replay({ { text = "never", prefill_ms = 1e8 } }, { hooks = {
        on_request = function(request) seen[1] = request end,
        on_token = sees and function() end or nil } })
      local c = begin(body(0))
      collectgarbage()
      collectgarbage()
      assert.equal(sees, seen[1] ~= nil)
      end_it(c)
      if not sees then server:close() end
    end
  end)

  it("is looked through when a large one has ended", function()
    local seen = setmetatable({}, { __mode = "v" })
    server = served.replay({ "x" },
      { hooks = { on_request = function(request) seen[1] = request.junk end } })
    collectgarbage("stop")
    local mode = collectgarbage("incremental")
    finally(function()
      collectgarbage(mode)
      collectgarbage("restart")
    end)
    assert.equal(200, client.ask(server, "POST", PATH, body(30000)).status)
    run_until(function() return not server.room.sweeps end)
    assert.is_nil(seen[1])
  end)
end)
