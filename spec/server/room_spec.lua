-- What requests take in memory is bounded, and is let go.

local client = require "spec.support.client"
local direct = require "spec.support.direct"
local json = require "moonlet.json"
local openapi = require "moonlet.server.openapi"
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

  it("is taken in steps by long bodies, between which others have their turn", function()
    server = served.replay { "x" }
    local seen, whole = {}, { parse = json.parse, value = json.value }
    finally(function() json.parse, json.value = whole.parse, whole.value end)
    for name, fn in pairs(whole) do
      json[name] = function(...)
        seen[#seen + 1] = name
        return fn(...)
      end
    end
    for is_long, expected in pairs { [false] = "parse value done ",
      [true] = "parse other value other done " } do
      local is_done = false
      seen = {}
      server.loop:spawn(function()
        server.room:decode("{}", {}, is_long)
        seen[#seen + 1], is_done = "done", true
        server.loop:stop()
      end)
      server.loop:spawn(function()
        while not is_done do
          seen[#seen + 1] = "other"
          server.loop:sleep(0)
        end
      end)
      assert(server.loop:run())
      local order = table.concat(seen, " ") .. " "
      while order:find("other other ", 1, true) do order = order:gsub("other other ", "other ") end
      assert.equal(expected, order:match("^.-done "))
    end
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

  -- What a reply is handed out in.
  local function ask_direct(given)
    local reply
    server.loop:spawn(function()
      reply = direct.ask(server, openapi.document(server.limits, false), given)
      server.loop:stop()
    end)
    assert(server.loop:run())
    return reply
  end

  it("is not taken for long answers, which are made piece by piece", function()
    server = served.replay { "x" }
    local text, ids = ("x,.;"):rep(1 << 15), {}
    for i = 1, 100000 do ids[i] = i % 4000 end
    for path, bodies in pairs { ["/tokenize"] = { { prompt = text },
      { prompt = text, return_token_strs = true },
      { messages = { { role = "user", content = text } } } },
      ["/detokenize"] = { { tokens = ids } } } do
      for _, given in ipairs(bodies) do
        local reply = ask_direct { method = "POST", target = path, body = json.encode(given),
          fields = { host = "localhost" } }
        assert.equal(200, reply.status)
        assert.is_true(#reply.body > 4 * reply.largest)
        local listed = reply.json.tokens or {}
        if given.prompt then assert.same(server.model:encode(text), listed) end
        assert.equal(reply.json.count or 0, #listed)
        if given.return_token_strs then assert.equal(text, table.concat(reply.json.token_strs)) end
        if given.tokens then assert.equal(server.model:decode(ids), reply.json.prompt) end
      end
    end
  end)

  it("is taken for no list of more tokens than a prompt may have", function()
    server = served.replay({ "x" }, { ctx = 64 })
    local made = {}
    local make = server.prompts.make
    function server.prompts.make(...)
      made[#made + 1] = assert(make(...))
      return made[#made]
    end
    for n, text in ipairs { "short", ("word "):rep(1000) } do
      local messages = { { role = "user", content = text } }
      assert.equal(n == 1 and 200 or 400,
        client.ask(server, "POST", PATH, { messages = messages }).status)
      assert.equal(n == 1, made[n].ids ~= nil)
      assert.equal(made[n].n, client.ask(server, "POST", "/v1/messages/count_tokens",
        { messages = messages }).json.input_tokens)
      table.remove(made)
    end
  end)

  it("is taken for answers, too, while their clients read them", function()
    server = served.replay({ "x" }, { limits = { decoded_bytes = 1 << 20 } })
    local mark = os.tmpname()
    os.remove(mark)
    local c = client.start(server.port, 'cat "$0.in" >&3; until [ -e ' .. mark
      .. " ]; do sleep 0.01; done", client.bytes("POST", "/tokenize",
      { prompt = ("x,.;"):rep(1 << 20) }))
    local n_ids = 4 << 20
    run_until(function() return server.room.taken > 4 * n_ids end)
    assert.equal(503, client.ask(server, "POST", "/tokenize", { prompt = "x" }).status)
    local request = next(server.exchanges)
    run_until(function() return request:pending() > 0 end)
    assert.is_true(request:pending() < 1 << 20) -- no more is made than is about to be taken
    assert(io.open(mark, "w")):close()
    client.wait(server, { c })
    run_until(function() return server.room.taken == 0 end)
    os.remove(mark)
    c.output()
  end)

  it("is taken for reading one large body after the other", function()
    server = served.replay({ "x" }, { queue = 8 })
    local make, n_now, n_most = server.prompts.make, 0, 0
    function server.prompts.make(...)
      n_now = n_now + 1
      n_most = math.max(n_most, n_now)
      local p, message, code = make(...)
      n_now = n_now - 1
      return p, message, code
    end
    local large = { messages = { { role = "user", content = ("word "):rep(100000) } } }
    for _, reply in ipairs(client.all(server, { { "POST", PATH, large }, { "POST", PATH, large },
      { "POST", "/tokenize", large }, { "POST", "/v1/messages/count_tokens", large } })) do
      assert.is_true(reply.status == 400 or reply.status == 200)
    end
    assert.equal(1, n_most)
    run_until(function() return not server.room.is_taken end)
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
