-- Log-probabilities of long answers: few bytes until they are written, and written piece by piece.

local direct = require "spec.support.direct"
local json = require "moonlet.json"
local longer = require "moonlet.server.longer"
local moonlet = require "moonlet"
local openapi = require "moonlet.server.openapi"
local packed = require "moonlet.server.packed"
local served = require "spec.support.served"

local CHAT <const>, TEXTS <const> = "/v1/chat/completions", "/v1/completions"

local function token(n)
  local top = {}
  for i = 1, n do top[i] = { id = 1000 * i, logprob = -i / 3 } end
  return { id = (1 << 31) - 1, logprob = -0.1, top = top }
end

describe("a token that is kept", function()
  it("is the same to the last bit", function()
    for _, n in ipairs { 0, 1, 20 } do
      assert.same(token(n), packed.unpack(packed.pack(token(n))))
    end
    assert.same({ id = 1, logprob = -math.huge, top = {} },
      packed.unpack(packed.pack { id = 1, logprob = -math.huge }))
  end)

  it("takes as many bytes as is said", function()
    local list, one, n = {}, token(20), 1000
    collectgarbage()
    collectgarbage()
    for i = 1, n do
      one.id = i -- no string is like another
      list[i] = packed.pack(one)
    end
    collectgarbage()
    collectgarbage()
    local before = collectgarbage("count")
    while #list > 0 do list[#list] = nil end
    collectgarbage()
    collectgarbage()
    local bytes = (before - collectgarbage("count")) * 1024 / n + 16
    assert.is_true(bytes > 256 and bytes <= packed.bytes(20), tostring(bytes))
  end)
end)

describe("JSON with lists that are made while it is written", function()
  local function with(list)
    return json.object({ b = json.array { json.object({ list = list, x = 1.5 }, { "x" }) },
      a = json.array { 1, 2 }, c = json.array {}, d = json.object {}, e = json.null, f = "\1" },
      { "b", "a" })
  end

  it("is what it is without them", function()
    for n = 0, 3 do
      local made = json.array {}
      for i = 1, n do made[i] = { i = i } end
      for _, style in ipairs { { separators = { ",", ":" } }, false } do
        assert.equal(json.encode(with(made), style or nil), longer.encode(
          with(longer.list(n, function(i, own)
            return json.encode({ i = i }, own)
          end)), style or nil))
      end
    end
  end)
end)

describe("an answer with log-probabilities", function()
  local model, server
  setup(function() model = assert(moonlet.open(served.DIR, { threads = 1 })) end)
  teardown(function() model:close() end)
  after_each(function() server:close() end)

  -- The reply to a request, and the most that has been taken of the server's room meanwhile.
  local function ask(path, body)
    local reply, most, take = nil, 0, server.room.take
    function server.room.take(...)
      local bytes = take(...)
      most = math.max(most, server.room.taken)
      return bytes
    end
    body.messages = path == CHAT and { { role = "user", content = "Hi" } } or nil
    server.loop:spawn(function()
      reply = direct.ask(server, openapi.document(server.limits, false), { method = "POST",
        target = path, body = json.encode(body), fields = { host = "localhost" } })
      server.loop:stop()
    end)
    assert(server.loop:run())
    server.room.take = nil
    assert.equal(0, server.room.taken)
    return reply, most
  end

  it("is written piece by piece", function()
    server = served.model(model)
    local text = ("Once upon a time there was a little girl. "):rep(50)
    for _, case in ipairs {
      { CHAT, { n = 3, max_tokens = 80, logprobs = true, top_logprobs = 20 } },
      { TEXTS, { n = 3, max_tokens = 200, logprobs = 20, prompt = "Once" } },
      { TEXTS, { max_tokens = 0, logprobs = 20, echo = true, prompt = text } },
      { TEXTS, { max_tokens = 1, prompt_logprobs = 20, prompt = text } },
    } do
      case[2].ignore_eos = true
      local reply = ask(table.unpack(case))
      assert.equal(200, reply.status, reply.body)
      assert.is_true(#reply.body > 2 * reply.largest)
      assert.is_true(reply.largest < 1 << 17)
    end
  end)

  it("counts as memory until it is written, or sent", function()
    server = served.replay { ("one two "):rep(500) }
    local function most_of(path, body)
      body.max_tokens = 1000
      local reply, most = ask(path, body)
      assert.equal(200, reply.status)
      return most
    end
    local bytes = 1000 * packed.bytes(1)
    assert.is_true(most_of(CHAT, { logprobs = true, top_logprobs = 1 }) > bytes)
    assert.is_true(most_of(TEXTS, { logprobs = 1, prompt = "x" }) > bytes)
    assert.is_true(most_of(CHAT, { logprobs = true, top_logprobs = 1, stream = true }) < bytes / 4)
    assert.is_true(most_of(TEXTS, { logprobs = 1, prompt = "x", stream = true }) < bytes / 4)
    assert.is_true(most_of(CHAT, {}) < bytes / 4)
  end)

  it("is not begun where it may take more than there is", function()
    server = served.replay({ "Hello" }, { limits = { decoded_bytes = 1 << 20 } })
    for _, case in ipairs {
      { 400, CHAT, { n = 2, max_tokens = 2000, logprobs = true, top_logprobs = 20 } },
      { 400, CHAT, { logprobs = true, top_logprobs = 20 } },
      { 200, CHAT, { logprobs = true, top_logprobs = 20, stream = true } },
      { 200, CHAT, { n = 2, max_tokens = 1000, logprobs = true, top_logprobs = 20 } },
      { 200, CHAT, { n = 3, max_tokens = 4000 } },
      { 400, TEXTS, { prompt = { "x", "y" }, max_tokens = 2000, logprobs = 20 } },
      { 200, TEXTS, { prompt = { "x", "y" }, max_tokens = 2000, logprobs = 2 } },
    } do
      local reply = ask(case[2], case[3])
      assert.equal(case[1], reply.status, reply.body)
      assert.equal(case[1] == 400, reply.body:find("more than 1048576", 1, true) ~= nil)
    end
  end)

  it("ends where others take too much", function()
    local n = 0
    server = served.replay({ ("one two "):rep(50) }, { hooks = { on_token = function()
      n = n + 1
      if n == 20 then server.room.max = -1 end
    end } })
    assert.equal(503, ask(CHAT, { logprobs = true, top_logprobs = 1 }).status)
    assert.is_true(n < 100)
  end)
end)
