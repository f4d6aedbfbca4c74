-- Text completions, embeddings, tokens and metrics, over the demo model.

local client = require "spec.support.client"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local served = require "spec.support.served"

local TEXT <const> = "Once upon a time there was a little girl."

describe("a served model's texts", function()
  local model, server
  setup(function() model = assert(moonlet.open(served.DIR, { threads = 2 })) end)
  teardown(function() model:close() end)
  before_each(function() server = served.model(model) end)
  after_each(function() server:close() end)

  local function post(path, body) return client.ask(server, "POST", path, body) end
  local function complete(body)
    local reply = post("/v1/completions", body)
    assert.equal(200, reply.status, reply.body)
    return reply.json
  end

  -- Of ids[2..], by the logits of one step after the other.
  local function expected_logprobs(ids)
    local session <close> = assert(model:session { ctx = #ids })
    local list = {}
    for i = 1, #ids - 1 do
      assert(session:step(ids[i]))
      list[i + 1] = session:logits():logprob(ids[i + 1])
    end
    return list
  end

  it("go on", function()
    local r = complete { prompt = TEXT, temperature = 0, max_tokens = 12 }
    local session <close> = assert(model:session { ctx = 256 })
    session:sync(model:encode(TEXT))
    local expected = require("moonlet.generate").collect(session,
      { temperature = 0, max_tokens = 12 })
    assert.same({ "text_completion", expected.text, "length", 12 }, { r.object,
      r.choices[1].text, r.choices[1].finish_reason, r.usage.completion_tokens })
    assert.equal(16, complete { prompt = TEXT, ignore_eos = true }.usage.completion_tokens)
  end)

  it("go on from ids, several at once, in order", function()
    local a, b = model:encode(TEXT), model:encode("The capital of France")
    local r = complete { prompt = { a, b }, n = 2, seed = 3, max_tokens = 6 }
    assert.equal(4, #r.choices)
    for i, choice in ipairs(r.choices) do assert.equal(i - 1, choice.index) end
    local same = complete { prompt = { TEXT, "The capital of France" }, n = 2, seed = 3,
      max_tokens = 6 }
    for i, choice in ipairs(r.choices) do assert.equal(choice.text, same.choices[i].text) end
  end)

  it("are scored: echo without generation, as for perplexity", function()
    local ids = model:encode(TEXT)
    local expected = expected_logprobs(ids)
    for n_top = 0, 3 do
      local r = complete { prompt = TEXT, echo = true, max_tokens = 0, logprobs = n_top }
      local choice, lists = r.choices[1], r.choices[1].logprobs
      assert.same({ TEXT, "length", #ids, 0 }, { choice.text, choice.finish_reason,
        r.usage.prompt_tokens, r.usage.completion_tokens })
      assert.equal(#ids, #lists.tokens)
      assert.same({ json.null, json.null, 0 }, { lists.token_logprobs[1], lists.top_logprobs[1],
        lists.text_offset[1] })
      for i = 2, #ids do
        assert.is_true(math.abs(lists.token_logprobs[i] - expected[i]) < 1e-5)
        assert.equal(lists.tokens[i], TEXT:sub(lists.text_offset[i] + 1,
          lists.text_offset[i] + #lists.tokens[i]))
        local best, n = -math.huge, 0
        for _, logprob in pairs(lists.top_logprobs[i]) do
          best, n = math.max(best, logprob), n + 1
        end
        assert.is_true(n >= math.max(1, n_top) and n <= n_top + 1)
        if n_top > 0 then assert.is_true(best >= lists.token_logprobs[i]) end
      end
    end
  end)

  -- OpenAI's spelling, seen in answers of gpt-3.5-turbo-instruct: "\u{9002}" as "bytes:\xe9\x80",
  -- "bytes:\x82".
  it("are scored token by token where these are parts of characters", function()
    local text = "Once \\ \u{9002}\u{1F642} upon"
    local lists = complete { prompt = text, echo = true, max_tokens = 0, logprobs = 20 }
      .choices[1].logprobs
    local whole, n_parts = "", 0
    for i, token in ipairs(lists.tokens) do
      local bytes = token:match("^bytes:(.*)$")
      if bytes then
        n_parts = n_parts + 1
        bytes = bytes:gsub("\\x(%x%x)", function(digits)
          return string.char(tonumber(digits, 16))
        end)
      end
      whole = whole .. (bytes or token)
      if i > 1 then
        local n = 0
        for other in pairs(lists.top_logprobs[i]) do
          assert.is_nil(other:find("\u{FFFD}", 1, true))
          n = n + 1
        end
        assert.is_true(n >= 20) -- none has taken another's place
      end
    end
    assert.equal(text, whole)
    assert.is_true(n_parts > 2)
  end)

  it("are scored as vLLM does it, streamed and whole", function()
    local ids = model:encode(TEXT)
    local expected = expected_logprobs(ids)
    local body = { prompt = TEXT, prompt_logprobs = 1, max_tokens = 3, temperature = 0, echo = true,
      logprobs = 0 }
    local whole = complete(body).choices[1]
    assert.equal(json.null, whole.prompt_logprobs[1])
    for i = 2, #ids do
      local entry = whole.prompt_logprobs[i][tostring(ids[i])]
      assert.is_true(math.abs(entry.logprob - expected[i]) < 1e-5)
      assert.is_string(entry.decoded_token)
    end
    body.stream = true
    local text, tokens, reason = "", {}, nil
    for _, event in ipairs(client.events(post("/v1/completions", body))) do
      local choice = event ~= "[DONE]" and event.choices[1]
      if choice then
        text = text .. choice.text
        if choice.logprobs ~= json.null then
          table.move(choice.logprobs.tokens, 1, #choice.logprobs.tokens, #tokens + 1, tokens)
        end
        if choice.finish_reason ~= json.null then reason = choice.finish_reason end
      end
    end
    assert.same({ whole.text, "length" }, { text, reason })
    assert.same(setmetatable(whole.logprobs.tokens, nil), tokens)
  end)

  it("are refused when they cannot be", function()
    for _, row in ipairs {
      { "prompt", {} }, { "prompt", { prompt = json.array {} } }, { "prompt", { prompt = 5 } },
      { "prompt", { prompt = { 99999 } } }, { "prompt", { prompt = { { 1 }, true } } },
      { "suffix", { prompt = "a", suffix = "b" } },
      { "max_tokens", { prompt = "a", max_tokens = 0 } },
      { "logprobs", { prompt = "a", logprobs = 21 } },
    } do
      local reply = post("/v1/completions", row[2])
      assert.same({ 400, row[1] }, { reply.status, reply.json.error.param }, reply.body)
    end
    local empty = post("/v1/completions", { prompt = "" })
    assert.same({ 400, "prompt" }, { empty.status, empty.json.error.param })
  end)

  it("have embeddings: the mean of the last norm's output", function()
    local ids = model:encode(TEXT)
    local session <close> = assert(model:session { ctx = #ids })
    local targets = {}
    for i = 1, #ids do targets[i] = 0 end
    local final = assert(session:final(ids, targets))
    local bytes, n, expected = final:bytes(), #ids, {}
    local hidden = #bytes // 4 // n
    for i = 1, hidden do
      local sum = 0
      for t = 0, n - 1 do sum = sum + string.unpack("<f", bytes, 4 * (t * hidden + i) - 3) end
      expected[i] = sum / n
    end
    local reply = post("/v1/embeddings", { input = { TEXT, ids }, model = "e" })
    assert.equal(200, reply.status, reply.body)
    assert.same({ 2, 2 * n }, { #reply.json.data, reply.json.usage.total_tokens })
    for k = 1, 2 do
      for i = 1, hidden do
        assert.is_true(math.abs(expected[i] - reply.json.data[k].embedding[i]) < 1e-4)
      end
    end
    local short = post("/v1/embeddings", { input = TEXT, encoding_format = "base64",
      dimensions = 3 }).json.data[1].embedding
    local packed = string.pack("<fff", table.unpack(reply.json.data[1].embedding, 1, 3))
    local pipe = assert(io.popen("echo " .. short .. " | base64 -d"))
    assert.equal(packed, pipe:read("a"))
    pipe:close()
    server.engine.score = function() error("evaluated") end
    local large = post("/v1/embeddings", { input = TEXT, dimensions = hidden + 1 })
    server.engine.score = nil
    assert.same({ 400, "dimensions" }, { large.status, large.json.error.param })
    assert.equal(400, post("/v1/embeddings", { input = TEXT, encoding_format = "xml" }).status)
  end)

  it("are read beside generations", function()
    local replies = client.all(server, {
      { "POST", "/v1/completions", { prompt = TEXT, temperature = 0, max_tokens = 40 } },
      { "POST", "/v1/embeddings", { input = (TEXT .. " "):rep(20) } },
      { "POST", "/v1/completions", { prompt = TEXT, echo = true, max_tokens = 0, logprobs = 2 } },
      { "POST", "/v1/embeddings", { input = TEXT } },
    })
    for _, reply in ipairs(replies) do assert.equal(200, reply.status, reply.body) end
    assert.equal(complete { prompt = TEXT, temperature = 0, max_tokens = 40 }.choices[1].text,
      replies[1].json.choices[1].text)
  end)

  it("become tokens and back", function()
    local r = post("/tokenize", { prompt = TEXT, return_token_strs = true }).json
    assert.same({ #model:encode(TEXT), 1024, TEXT },
      { r.count, r.max_model_len, table.concat(r.token_strs) })
    assert.equal(TEXT, post("/detokenize", { tokens = r.tokens }).json.prompt)
    local messages = { { role = "user", content = "Hi" } }
    local chat = post("/tokenize", { messages = messages }).json
    assert.same(model:encode(model:render(messages, { add_generation_prompt = true })),
      setmetatable(chat.tokens, nil))
    assert.equal(400, post("/tokenize", { text = "x" }).status)
    assert.equal(400, post("/detokenize", { tokens = { -1 } }).status)
  end)

  it("are counted", function()
    complete { prompt = TEXT, max_tokens = 5, ignore_eos = true }
    complete { prompt = TEXT, max_tokens = 5, ignore_eos = true }
    local text = client.ask(server, "GET", "/metrics").body
    local n = #model:encode(TEXT)
    for name, value in pairs { prompt_tokens_total = 2 * n, prefix_cache_hits_total = n,
      generation_tokens_total = 10, num_requests_running = 0,
      time_to_first_token_seconds_count = 2, e2e_request_latency_seconds_count = 2 } do
      assert.equal(tostring(value), text:match("\nvllm:" .. name .. "{[^}]*} (%S+)"), name)
    end
    assert.matches('vllm:request_success_total{engine="0",model_name="demo%-model",'
      .. 'finished_reason="length"} 2\n', text)
    assert.matches('# TYPE vllm:inter_token_latency_seconds histogram\n', text)
  end)
end)
