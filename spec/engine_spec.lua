local engine = require "moonlet.engine"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local prompt_of = require "moonlet.prompt"
local sched = require "moonlet.sched"

local DIR <const> = "examples/demo-model"

describe("engine", function()
  local model, loop
  setup(function() model = assert(moonlet.open(DIR, { threads = 2 })) end)
  teardown(function() model:close() end)
  before_each(function() loop = assert(sched.open()) end)
  after_each(function() loop:close() end)

  local function prompt(text)
    return assert(model:encode(assert(model:render({ { role = "user", content = text } },
      { add_generation_prompt = true }))))
  end

  local function alone(ids, options)
    local session <close> = assert(model:session { ctx = 1024 })
    assert(session:sync(ids))
    return assert(require("moonlet.generate").collect(session, options))
  end

  -- Runs fn as a coroutine until it returns.
  local function run(fn, options)
    options = options or {}
    options.ctx = 1024
    loop:spawn(function()
      local e <close> = assert(engine.open(model, loop, options))
      fn(e)
      loop:stop()
    end)
    assert(loop:run())
  end

  local function collect(ticket)
    local ids = {}
    for token in ticket:tokens() do ids[#ids + 1] = token.id end
    return ids
  end

  local QUESTIONS <const> = { "What is the capital of France?", "Say: blue tiger 42.",
    "What is 3 + 4?", "Which word is longest: cat, elephant, dog?", "Hello!", "Tell me a story.",
    "What is the capital of Japan?" }

  it("gives every sequence what it gets alone", function()
    local options = { max_tokens = 24, temperature = 0.8, top_k = 40 }
    local expected = {}
    for i, text in ipairs(QUESTIONS) do
      options.seed = i
      expected[i] = alone(prompt(text), options)
    end
    run(function(e)
      local tickets = {}
      for i, text in ipairs(QUESTIONS) do
        tickets[i] = assert(e:submit { ids = prompt(text),
          options = { max_tokens = 24, temperature = 0.8, top_k = 40, seed = i } })
      end
      for i, ticket in ipairs(tickets) do
        assert.same(expected[i].ids, collect(ticket))
        assert.equal(expected[i].finish_reason, ticket.finish_reason)
      end
      assert.is_true(e.stats.batches < e.stats.generated_tokens)
    end, { sessions = 3 })
  end)

  it("goes on where an earlier prompt left off, to the bit", function()
    local text = assert(model:render({ { role = "user", content = QUESTIONS[1] } },
      { add_generation_prompt = true }))
    local options = { max_tokens = 30, temperature = 0, top_logprobs = 5 }
    run(function(e)
      local ids = assert(model:encode(text))
      local first = assert(e:submit { ids = ids, options = options })
      local said = collect(first)
      assert.same({ 0, #ids }, { first.reused, first.evaluated })
      -- The next turn: what was said, and a new question.
      local more = table.move(said, 1, #said, #ids + 1, table.move(ids, 1, #ids, 1, {}))
      more[#more + 1] = first.generation.stop_id
      local next_turn = assert(model:encode("\n<|im_start|>user\nAnd of Japan?<|im_end|>\n"
        .. "<|im_start|>assistant\n"))
      table.move(next_turn, 1, #next_turn, #more + 1, more)
      local second = assert(e:submit { ids = more, options = options })
      local again = collect(second)
      assert.equal(#ids + #said, second.reused)
      assert.equal(#more - #ids - #said, second.evaluated)
      assert.same(alone(more, options).ids, again)
      -- The same prompt once more needs nothing but sampling.
      local third = assert(e:submit { ids = more, options = options })
      assert.same(again, collect(third))
      assert.same({ #more, 0 }, { third.reused, third.evaluated })
    end)
  end)

  it("scores texts in pieces beside generations, to the same bits", function()
    local text = prompt(("The cat sat on the mat, and so on. "):rep(26))
    local session <close> = assert(model:session { ctx = #text })
    local steps, n_vocab = {}, model:info().config.vocab_size
    for i = 1, #text - 1 do
      assert(session:step(text[i]))
      local logits = session:logits()
      local best, values = logits:topk(3)
      local own = logits:logprob(text[i + 1])
      local log_sum = logits:get(text[i + 1]) - own
      local above, not_below = 0, 0
      for id = 0, n_vocab - 1 do
        local logprob = logits:get(id) - log_sum
        if logprob > own + 1e-4 then above = above + 1 end
        if logprob > own - 1e-4 then not_below = not_below + 1 end
      end
      steps[i + 1] = { own, best, { values[1] - log_sum, values[2] - log_sum }, above, not_below }
    end
    local start, most = model.start, {}
    function model.start(m, parts)
      for _, part in ipairs(parts) do
        if part.score then most[#parts] = math.max(most[#parts] or 0, #part.ids) end
      end
      return start(m, parts)
    end
    finally(function() model.start = nil end)
    run(function(e)
      local beside, quiet = model:scoring(text, { top = 3 }), model:scoring(text, { top = 3 })
      local means = { model:scoring(text, { mean = true }), model:scoring(text, { mean = true }) }
      local talk = assert(e:submit { ids = prompt(QUESTIONS[6]),
        options = { max_tokens = 60, temperature = 0, stop_ids = {} } })
      talk:next()
      for _, score in ipairs { beside, means[1] } do
        local ticket = assert(e:score { ids = text, score = score })
        ticket:wait()
        assert.same({ "stop", #text }, { ticket.finish_reason, ticket.evaluated })
      end
      assert.is_nil(talk.finish_reason) -- it had its turns meanwhile
      talk:cancel()
      for _, score in ipairs { quiet, means[2] } do
        local ticket = assert(e:score { ids = text, score = score })
        ticket:wait()
      end
      assert.same({ #text, 16 }, most)
      assert.same(means[2]:mean(), means[1]:mean())
      for i = 2, #text do
        local own, best, values, rank = quiet:at(i)
        assert.same({ own, best, values, rank }, { beside:at(i) })
        assert.is_true(rank > steps[i][4] and rank <= steps[i][5])
        assert.equal(rank <= 3, best[rank] == text[i])
        assert.same(steps[i][2], best)
        assert.is_true(math.abs(steps[i][1] - own) < 1e-5)
        assert.is_true(math.abs(steps[i][3][2] - values[2]) < 1e-5)
      end
    end)
  end)

  it("counts texts to be scored among those that may wait", function()
    run(function(e)
      local text = prompt(QUESTIONS[1])
      local function score()
        return e:score { ids = text, score = model:scoring(text) }
      end
      local first = assert(score()) -- the session's
      for _ = 1, 2 do assert(score()) end
      assert.equal("busy", select(3, score()))
      first:cancel()
      assert.equal("cancelled", first.finish_reason)
      local last = assert(score())
      last:wait()
      assert.equal("stop", last.finish_reason)
      local long = {}
      for i = 1, 1025 do long[i] = 5 end
      assert.equal("limit", select(3, e:score { ids = long, score = model:scoring(long) }))
    end, { sessions = 1, queue = 2 })
  end)

  it("refuses pieces of another text than the one that is scored", function()
    local session <close> = assert(model:session { ctx = 16 })
    local score = model:scoring({ 5, 6, 99999 })
    for _, ids in ipairs { { 6 }, { 5, 6 }, { 5, 6, 7 } } do
      local ok, message, code = model:eval { { session = session, ids = ids, score = score } }
      assert.same({ nil, "range" }, { ok, code })
      assert.matches("no piece of the text", message)
    end
    assert(model:eval { { session = session, ids = { 5 }, score = score } })
    assert.error(function() score:at(1) end)
    assert.error(function() score:mean() end)
    assert.error(function() model:scoring({ 5 }, { top = 1000 }) end)
  end)

  it("keeps the points of a prompt that it was asked to keep", function()
    run(function(e)
      local ids = prompt(QUESTIONS[2])
      local cut = #ids - 5
      collect(assert(e:submit { ids = ids, options = { max_tokens = 1 }, keep_at = { 3, cut } }))
      local other = table.move(ids, 1, cut, 1, {})
      other[#other + 1] = 17
      local ticket = assert(e:submit { ids = other, options = { max_tokens = 3 } })
      collect(ticket)
      assert.same({ cut, 1 }, { ticket.reused, ticket.evaluated })
    end)
  end)

  it("reads of a conversation that was edited what follows the edit only", function()
    run(function(e)
      local prompts = prompt_of.new(model)
      local talk = json.array {}
      for i, text in ipairs(QUESTIONS) do
        talk[i] = { role = i % 2 == 1 and "user" or "assistant", content = text }
      end
      local p = assert(prompts:make(talk))
      assert.equal(#QUESTIONS, #p.keep_at) -- before every message but the first, and the answer
      collect(assert(e:submit { ids = p.ids, keep_at = p.keep_at, options = { max_tokens = 1 } }))
      for i = #QUESTIONS, 2, -1 do
        talk[i].content = "Something else."
        local edited = assert(prompts:make(talk))
        local ticket = assert(e:submit { ids = edited.ids, options = { max_tokens = 1 } })
        collect(ticket)
        assert.equal(p.keep_at[i - 1], ticket.reused)
      end
    end)
  end)

  it("goes on where thoughts began that the template drops, to the bit", function()
    run(function(e)
      local prompts = prompt_of.new(model)
      local thinking, options = { enable_thinking = true }, { max_tokens = 12, temperature = 0 }
      local talk = json.array { { role = "user", content = QUESTIONS[1] } }
      local p = assert(prompts:make(talk, thinking))
      collect(assert(e:submit { ids = p.ids, keep_at = p.keep_at, options = options }))
      talk[2] = { role = "assistant", content = "Paris.", reasoning_content = "France." }
      talk[3] = { role = "user", content = QUESTIONS[7] }
      local more = assert(prompts:make(talk, thinking))
      local n_common = 0
      while p.ids[n_common + 1] == more.ids[n_common + 1] do n_common = n_common + 1 end
      assert.is_true(n_common < #p.ids)
      local ticket = assert(e:submit { ids = more.ids, keep_at = more.keep_at, options = options })
      local ids, logprobs = {}, {}
      for token in ticket:tokens() do
        ids[#ids + 1], logprobs[#logprobs + 1] = token.id, token.logprob
      end
      assert.equal(n_common, ticket.reused)
      local expected = alone(more.ids, options)
      assert.same({ expected.ids, expected.logprobs }, { ids, logprobs })
    end)
  end)

  it("reads once what prompts that come together begin with", function()
    local shared, options = {}, { max_tokens = 6, temperature = 0, stop_ids = {} }
    for i = 1, 400 do shared[i] = i % 300 end
    local prompts, expected = {}, {}
    for i = 1, 4 do
      prompts[i] = table.move(shared, 1, 400, 1, {})
      if i > 1 then prompts[i][401], prompts[i][402] = i // 3, i end
      expected[i] = alone(prompts[i], options).ids
    end
    local start, n_evaluated = model.start, nil
    function model.start(m, parts)
      for _, part in ipairs(parts) do n_evaluated = n_evaluated + #part.ids end
      return start(m, parts)
    end
    finally(function() model.start = nil end)
    for n_cancelled = 0, 1 do
      run(function(e)
        local tickets = {}
        n_evaluated = 0
        local put = e.cache.put
        function e.cache.put(...)
          if n_cancelled > 0 then tickets[1]:cancel() end
          return put(...)
        end
        for i, ids in ipairs(prompts) do
          tickets[i] = assert(e:submit { ids = ids, keep_at = { 300, 400 }, options = options })
        end
        for i = 1 + n_cancelled, 4 do assert.same(expected[i], collect(tickets[i])) end
        -- 401 is the same in the last two, but nobody was asked to keep the state there.
        assert.equal(400 + 3 * 2 + 6 * (4 - n_cancelled), n_evaluated)
        assert.equal((3 - n_cancelled) * 400 + n_cancelled * 300, e.stats.cached_tokens)
      end)
    end
    run(function(e) -- nothing can be kept
      local tickets = {}
      for i, ids in ipairs(prompts) do
        tickets[i] = assert(e:submit { ids = ids, keep_at = { 300 }, options = options })
      end
      for i, ticket in ipairs(tickets) do assert.same(expected[i], collect(ticket)) end
      assert.equal(0, e.stats.cached_tokens)
    end, { cache_bytes = 0 })
  end)

  it("goes on with a conversation whose keys and values exceed the budget", function()
    local long = {}
    for i = 1, 900 do long[i] = i % 300 end
    run(function(e) -- room for two states; the rows of 900 tokens take 1.4 MB
      collect(assert(e:submit { ids = long, keep_at = { 600 }, options = { max_tokens = 1 } }))
      local other = table.move(long, 1, 600, 1, {})
      other[601] = 17
      local ticket = assert(e:submit { ids = other, options = { max_tokens = 1 } })
      collect(ticket)
      assert.equal(600, ticket.reused)
    end, { cache_bytes = 2 << 20, sessions = 1 })
  end)

  it("goes on from what a session holds, without a cache", function()
    local options = { max_tokens = 12, temperature = 0, stop_ids = {} }
    run(function(e)
      local ids = prompt(QUESTIONS[6])
      local others = assert(e:submit { ids = prompt(QUESTIONS[1]), options = options })
      local said = collect(assert(e:submit { ids = ids, options = options }))
      collect(others)
      local more = table.move(said, 1, #said, #ids + 1, table.move(ids, 1, #ids, 1, {}))
      more[#more + 1] = 17
      local ticket = assert(e:submit { ids = more, options = options })
      assert.same(alone(more, options).ids, collect(ticket))
      assert.same({ #ids + #said, 1 }, { ticket.reused, ticket.evaluated })
    end, { cache_bytes = 0, sessions = 3 })
  end)

  it("keeps states within its budget, or none", function()
    run(function(e)
      local ids = prompt(QUESTIONS[1])
      collect(assert(e:submit { ids = ids, options = { max_tokens = 4 } }))
      local again = assert(e:submit { ids = ids, options = { max_tokens = 4 } })
      collect(again)
      assert.equal(0, again.reused)
      assert.equal(0, e.cache.n)
    end, { cache_bytes = 0 })
    run(function(e)
      for i = 1, 12 do
        collect(assert(e:submit { ids = prompt(QUESTIONS[1] .. i), options = { max_tokens = 2 } }))
        assert.is_true(e.cache:used() <= 4 << 20)
      end
      assert.is_true(e.cache.n >= 1)
    end, { cache_bytes = 4 << 20 })
  end)

  it("ends what is cancelled, waiting, reading or generating, and goes on with the rest", function()
    local expected = alone(prompt(QUESTIONS[1]), { max_tokens = 8, temperature = 0 }).ids
    run(function(e)
      local long = {}
      for i = 1, 900 do long[i] = i % 300 end
      local story = { max_tokens = 400, temperature = 0, stop_ids = {} }
      local a = assert(e:submit { ids = prompt(QUESTIONS[6]), options = story })
      local b = assert(e:submit { ids = long, options = story })
      local c = assert(e:submit { ids = prompt(QUESTIONS[1]), options = { max_tokens = 8 } })
      assert(a:next())
      c:cancel()
      assert.equal("cancelled", c.finish_reason)
      b:cancel()
      local last = assert(e:submit { ids = prompt(QUESTIONS[1]),
        options = { max_tokens = 8, temperature = 0 } })
      assert.same(expected, collect(last))
      assert.equal("cancelled", b.finish_reason)
      assert.is_nil(a.finish_reason)
      a:cancel()
      collect(a)
      assert.equal("cancelled", a.finish_reason)
      assert.is_true(e:drain(5))
      assert.same({ 0, 0 }, { e:load() })
    end, { sessions = 2 })
  end)

  -- A model whose batches do not begin before somebody else has had a turn: what is cancelled then
  -- is cancelled in time.
  local function patient()
    local function start(_, parts)
      local is_cut = false
      local function cut() is_cut = true end
      return { is_done = function() return true end, cancel = cut, close = cut,
        result = function()
          if is_cut then return nil, "cut", "cancelled" end
          return model:eval(parts)
        end }
    end
    return setmetatable({ start = start }, { __index = model })
  end

  it("lets those who stay get on, however many leave", function()
    local long, options = {}, { max_tokens = 400, temperature = 0, stop_ids = {} }
    for i = 1, 900 do long[i] = i % 300 end
    run(function(e)
      e.model = patient()
      local stays = assert(e:submit { ids = prompt(QUESTIONS[6]), options = options })
      assert(stays:next())
      local leaves = assert(e:submit { ids = long, options = options })
      local n_before, n_cut = e.stats.generated_tokens, 0
      for _ = 1, 40 do
        local next_one = assert(e:submit { ids = long, options = options })
        while not leaves.in_job do loop:sleep(0) end
        local position = leaves.position
        leaves:cancel()
        while not leaves.finish_reason do loop:sleep(0) end
        if leaves.position == position then n_cut = n_cut + 1 end
        leaves = next_one
      end
      assert.is_true(n_cut >= 10, tostring(n_cut))
      assert.is_true(e.stats.generated_tokens - n_before >= 10)
      stays:cancel()
      leaves:cancel()
    end, { sessions = 3 })
  end)

  it("lets a short prompt not wait for the end of a long one", function()
    run(function(e)
      local long, short = {}, {}
      for i = 1, 1000 do long[i] = i % 300 end
      for i = 1, 200 do short[i] = i % 200 end
      local options = { max_tokens = 1 }
      local first = assert(e:submit { ids = long, options = options })
      local second = assert(e:submit { ids = short, options = options })
      collect(second)
      assert.is_nil(first.generation)
      assert.is_true(first.evaluated >= 200, first.evaluated)
      collect(first)
    end)
  end)

  it("ends what a stage of a sampler raises in, and nothing else", function()
    local expected = alone(prompt(QUESTIONS[1]), { max_tokens = 8, temperature = 0 }).ids
    run(function(e)
      local function stage(_, ctx)
        if #ctx.output_ids == 2 then error("no third token") end
        return true
      end
      local bad = assert(e:submit { ids = prompt(QUESTIONS[2]),
        options = { max_tokens = 8, sampler = moonlet.sampler { stage } } })
      local good = assert(e:submit { ids = prompt(QUESTIONS[1]),
        options = { max_tokens = 8, temperature = 0 } })
      assert.equal(2, #collect(bad))
      assert.same({ "error", "raised" }, { bad.finish_reason, bad.code })
      assert.matches("no third token", bad.message, 1, true)
      assert.same(expected, collect(good))
    end)
  end)

  it("refuses what cannot be served, at once", function()
    run(function(e)
      local _, message, code = e:submit { ids = {} }
      assert.same({ "the prompt is empty", "range" }, { message, code })
      local long = {}
      for i = 1, 1024 do long[i] = 1 end
      _, message, code = e:submit { ids = long }
      assert.same({ "a prompt of 1024 tokens leaves no room in a context of 1024", "limit" },
        { message, code })
      local waiting = {}
      for i = 1, 3 do
        waiting[i] = assert(e:submit { ids = { 5 }, options = { max_tokens = 1 } })
      end
      _, message, code = e:submit { ids = { 5 } }
      assert.same({ "too many requests wait", "busy" }, { message, code })
      for _, ticket in ipairs(waiting) do collect(ticket) end
      local bad = assert(e:submit { ids = { 99999 }, options = { max_tokens = 1 } })
      assert.same({}, collect(bad))
      assert.equal("error", bad.finish_reason)
      assert.matches("token id 99999", bad.message, 1, true)
    end, { queue = 2, sessions = 1 })
  end)

  it("takes what sessions are free for, however few may wait", function()
    for n_waiting = 0, 1 do
      run(function(e)
        local tickets, n = {}, 3 + n_waiting
        local function submit()
          return e:submit { ids = prompt(QUESTIONS[1]), options = { max_tokens = 8 } }
        end
        for i = 1, n do tickets[i] = assert(submit()) end
        assert.is_true(e:is_full())
        assert.equal("busy", select(3, submit()))
        assert(tickets[1]:next())
        assert.same({ 3, n_waiting }, { e:load() })
        assert.equal("busy", select(3, submit()))
        for _, ticket in ipairs(tickets) do ticket:wait() end
        assert.is_false(e:is_full())
        for i = 1, n do tickets[i] = assert(submit()) end -- in one turn of the loop
        assert.is_true(e:is_full())
      end, { sessions = 3, queue = n_waiting })
    end
  end)

  it("can be closed while it computes, as others go on", function()
    local start = model.start
    finally(function() model.start = nil end)
    function model.start(...) -- what was evaluated before the end of the engine is not looked at
      local job = assert(start(...))
      assert(job:result())
      return job
    end
    loop:spawn(function()
      local e = assert(engine.open(model, loop, { ctx = 1024 }))
      local ticket = assert(e:submit { ids = { 5, 6 },
        options = { max_tokens = 5, temperature = 0, stop_ids = {} } })
      assert(ticket:next())
      assert.is_not_nil(e.job)
      e:close()
      assert.equal("cancelled", ticket.finish_reason)
      for _ = 1, 3 do loop:sleep(0) end
      loop:stop()
    end)
    assert(loop:run())
  end)

  it("tells how much it keeps while it computes", function()
    run(function(e)
      local ticket = assert(e:submit { ids = prompt(QUESTIONS[1]),
        options = { max_tokens = 8, temperature = 0 } })
      while not e.job do loop:sleep(0) end
      assert.equal(0, e:cache_usage())
      collect(ticket)
      assert.is_true(e:cache_usage() > 0 and e:cache_usage() < 0.1)
    end)
  end)

  it("tells when nothing has come yet", function()
    run(function(e)
      local ticket = assert(e:submit { ids = { 5, 6 },
        options = { max_tokens = 1, temperature = 0 } })
      local token, why = ticket:next(0)
      assert.same({ nil, "waiting" }, { token, why })
      assert(ticket:next(5))
    end)
  end)
end)
