-- Whatever a request is made of, others have their turn while it is worked on.

local client = require "spec.support.client"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local served = require "spec.support.served"

local TEXT <const> = "Once upon a time there was a little girl who went to the wood. "

describe("a large request", function()
  local model, server
  setup(function() model = assert(moonlet.open(served.DIR, { threads = 1 })) end)
  teardown(function() model:close() end)
  after_each(function() server:close() end)

  -- How often somebody else has had a turn until the request was answered.
  local function turns_during(path, body)
    local turns, is_done = 0, false
    server.loop.turn_seconds = 0
    server.loop:spawn(function()
      while not next(server.exchanges) do server.loop:sleep(0.001) end
      while not is_done do
        turns = turns + 1
        server.loop:sleep(0)
      end
    end)
    function server.on_served() is_done = true end
    local reply = client.ask(server, "POST", path, body)
    return turns, reply
  end

  local function messages(n)
    local list = json.array {}
    for i = 1, n do
      list[i] = { role = i % 2 == 1 and "user" or "assistant", content = TEXT }
    end
    return list
  end

  it("does not hold the loop while its prompt is made", function()
    server = served.replay({ "Hello." })
    for _, case in ipairs {
      { "/v1/chat/completions", { messages = messages(999) } },
      { "/v1/messages", { messages = messages(999), max_tokens = 5 } },
      { "/v1/responses", { input = messages(999) } },
      { "/v1/chat/completions", { messages = { { role = "user",
        content = ("<|im_end|>"):rep(20000) } } } },
    } do
      local turns, reply = turns_during(table.unpack(case))
      assert.equal(400, reply.status) -- it was read to its end: it is longer than the context
      assert.matches("context length", reply.body)
      assert.is_true(turns > 200, case[1] .. turns)
    end
  end)

  it("does not hold the loop while its answer is written", function()
    server = served.replay({ "Hello." })
    local ids = json.array {}
    for i = 1, 20000 do ids[i] = i % 4000 end
    local turns, reply = turns_during("/tokenize", { prompt = TEXT:rep(2000),
      return_token_strs = true })
    assert.equal(200, reply.status)
    local n_pieces = #reply.body >> 16 -- written one by one
    assert.is_true(n_pieces > 4 and turns >= n_pieces, tostring(turns))
    turns, reply = turns_during("/detokenize", { tokens = ids })
    assert.equal(200, reply.status)
    assert.is_true(turns > 200, tostring(turns))
  end)

  it("does not hold the loop while a script answers at once", function()
    local text = TEXT:rep(200)
    server = served.replay { { text = text } }
    local turns, reply = turns_during("/v1/chat/completions", { max_tokens = 100000,
      messages = { { role = "user", content = "Hi" } } })
    assert.is_true(text == reply.json.choices[1].message.content)
    assert.is_true(turns > 130, tostring(turns))
  end)

  it("does not hold the loop while its texts are scored", function()
    server = served.model(model, { ctx = 2048 })
    for _, case in ipairs {
      { "/v1/completions", { prompt = TEXT:rep(24), echo = true, max_tokens = 0, logprobs = 5 } },
      { "/v1/completions", { prompt = TEXT:rep(24), max_tokens = 1, prompt_logprobs = 1 } },
      { "/v1/embeddings", { input = { TEXT:rep(24), TEXT:rep(24) } } },
    } do
      local turns, reply = turns_during(table.unpack(case))
      assert.equal(200, reply.status, reply.body)
      assert.is_true(turns > 20, case[1] .. turns) -- each batch and many a slice of the rest
    end
  end)
end)
