local core = require "moonlet.core"
local generate = require "moonlet.generate"
local sampler = require "moonlet.sampler"

-- A tokenizer of pieces: token i - 1 is pieces[i]; pieces may be parts of characters, and those
-- in angle brackets are control tokens.
local function new_tokenizer(pieces)
  local function special(id) return pieces[id + 1]:match("^<.*>$") ~= nil end
  local tokenizer = {}
  function tokenizer.n_vocab() return #pieces end
  function tokenizer.is_special(_, id) return special(id) end
  function tokenizer.id(_, text)
    for i, piece in ipairs(pieces) do
      if piece == text then return i - 1 end
    end
  end
  function tokenizer.stream(_, opts)
    local held, stream = "", {}
    function stream.step(_, id)
      local text = held .. ((opts.skip_special and special(id)) and "" or pieces[id + 1])
      local _, bad = utf8.len(text)
      held = bad and text:sub(bad) or ""
      return bad and text:sub(1, bad - 1) or text
    end
    function stream.finish()
      local text = held ~= "" and "\u{FFFD}" or ""
      held = ""
      return text
    end
    function stream:close() self.closed = true end
    tokenizer.opened = stream
    return stream
  end
  return tokenizer
end

-- A session whose next logits always favour the next token of a script, given as pieces.
local function new_session(script, opts)
  opts = opts or {}
  local pieces, ids, known = { "<eos>", "<other>" }, {}, {}
  for i, piece in ipairs(pieces) do known[piece] = i - 1 end
  for i, piece in ipairs(script) do
    if not known[piece] then
      pieces[#pieces + 1] = piece
      known[piece] = #pieces - 1
    end
    ids[i] = known[piece]
  end
  local session = {
    evaluated = table.move(opts.prompt or { 1, 1 }, 1, #(opts.prompt or { 1, 1 }), 1, {}),
    model = {
      tokenizer = new_tokenizer(pieces), stop_ids = { 0 },
      generation_config = opts.generation_config,
    },
    script_ids = ids,
  }
  local n_prompt = #session.evaluated
  function session:n_past() return #self.evaluated end
  function session.n_ctx() return opts.ctx or 100 end
  function session:ids() return table.move(self.evaluated, 1, #self.evaluated, 1, {}) end
  function session:step(id)
    if opts.fail_at == #self.evaluated - n_prompt + 1 then
      return nil, opts.fail_message, opts.fail_code
    end
    self.evaluated[#self.evaluated + 1] = id
    return true
  end
  function session:logits()
    local next_id = ids[#self.evaluated - n_prompt + 1] or 0
    local row = {}
    for i = 1, #pieces + (opts.padding or 0) do
      row[i] = i - 1 == next_id and 8 or i > #pieces and 99 or (i % 3) / 2
    end
    if opts.nan_at == #self.evaluated - n_prompt + 1 then row[1] = 0 / 0 end
    local bytes = string.pack("<" .. ("f"):rep(#row), table.unpack(row))
    return core.tensor("f32", { 1, #row }, bytes):row(1)
  end
  return session
end

local function texts(gen)
  local out = {}
  for tok in gen do out[#out + 1] = tok.text end
  return out
end

describe("generate", function()
  it("hands out tokens and ends at a stop token", function()
    local session = new_session{ "Hel", "lo", " world" }
    local gen = generate.tokens(session)
    local toks = {}
    for tok in gen do toks[#toks + 1] = tok end
    assert.equal(3, #toks)
    assert.equal("Hel", toks[1].text)
    assert.equal(session.script_ids[2], toks[2].id)
    assert.equal(session.script_ids[3], gen.ids[3])
    assert.equal("stop", gen.finish_reason)
    assert.equal(0, gen.stop_id)
    assert.is_nil(gen.stop)
    local z = 0
    for i = 1, 5 do z = z + math.exp(i == 3 and 8 or (i % 3) / 2) end
    assert.near(8 - math.log(z), toks[1].logprob, 1e-6)
    assert.is_nil(gen())
    assert.is_true(session.model.tokenizer.opened.closed)
  end)

  it("leaves the session with every token it handed out", function()
    local session = new_session{ "a", "b", "c", "d" }
    local gen = generate.tokens(session, { max_tokens = 3 })
    assert.same({ "a", "b", "c" }, texts(gen))
    assert.equal("length", gen.finish_reason)
    assert.is_nil(gen.pending)
    assert.same({ 1, 1, 2, 3, 4 }, session.evaluated)
    assert.same({ "d" }, texts(generate.tokens(session)))
  end)

  it("evaluates a token only when the next one is asked for", function()
    local session = new_session{ "a", "b", "c" }
    local gen
    for tok in generate.tokens(session) do
      gen = gen or tok
      if tok.text == "b" then break end
    end
    assert.same({ 1, 1, 2 }, session.evaluated)
    gen = generate.tokens(session)
    assert.equal("b", gen().text)
    assert.equal(3, gen.pending)
    gen:close()
    assert.equal("cancelled", gen.finish_reason)
    assert.is_nil(gen())
    assert.is_true(session.model.tokenizer.opened.closed)
  end)

  it("cuts at a stop string that spans tokens, and never shows its beginning", function()
    local gen = generate.tokens(new_session{ "one E", "N", "D two", " three" }, { stop = "END" })
    assert.same({ "one ", "", "" }, texts(gen))
    assert.equal("stop", gen.finish_reason)
    assert.equal("END", gen.stop)
    assert.equal(3, #gen.ids)
  end)

  it("lets go of what did not become a stop string", function()
    local gen = generate.tokens(new_session{ "E", "N", "EN", "D!", "x" }, { stop = { "END!" } })
    assert.same({ "", "", "EN", "" }, texts(gen))
    gen = generate.tokens(new_session{ "E", "N", "d", "E" }, { stop = { "END" } })
    assert.same({ "", "", "ENd", "", "E" }, texts(gen))
    assert.is_nil(gen.stop)
    assert.equal(4, #gen.ids) -- the last text came without a token
  end)

  it("takes the first of several stop strings", function()
    local session = new_session{ "ab cd ef" }
    local result = generate.collect(session, { stop = { "ef", "cd", "zz" } })
    assert.equal("ab ", result.text)
    assert.equal("cd", result.stop)
    assert.equal("stop", result.finish_reason)
  end)

  it("shows held back text with the last token that is allowed", function()
    local gen = generate.tokens(new_session{ "x", "E", "N" }, { stop = "END", max_tokens = 2 })
    assert.same({ "x", "E" }, texts(gen))
    assert.equal("length", gen.finish_reason)
  end)

  it("gives whole characters only", function()
    local gen = generate.tokens(new_session{ "a\xF0\x9F", "\x8C", "\x99b", "\xE2\x82" })
    assert.same({ "a", "", "\u{1F319}b", "", "\u{FFFD}" }, texts(gen))
    gen = generate.tokens(new_session{ "\xE2\x82", "\xAC" }, { max_tokens = 1 })
    assert.same({ "\u{FFFD}" }, texts(gen))
  end)

  it("stops at a control token named as a stop string", function()
    local script = { "a", "<end>", "b" }
    local result = generate.collect(new_session(script), { stop = "<end>" })
    assert.equal("a", result.text)
    assert.equal("<end>", result.stop)
    assert.equal(3, result.stop_id)
    assert.equal("a<end>b", generate.collect(new_session(script), { skip_special = false }).text)
    assert.equal("ab", generate.collect(new_session(script)).text)
  end)

  it("may stop before its first token", function()
    local session = new_session{ "<eos>", "a" }
    local result = generate.collect(session, { stop = "x" })
    assert.same({}, result.ids)
    assert.equal("", result.text)
    assert.equal("stop", result.finish_reason)
    assert.equal(0, result.stop_id)
    assert.same({ 1, 1 }, session.evaluated)
  end)

  it("finds a stop string whose characters span tokens", function()
    local script = { "caf\xC3", "\xA9 \xE2", "\x82", "\xAC!" }
    local result = generate.collect(new_session(script), { stop = "é €" })
    assert.equal("caf", result.text)
    assert.equal("é €", result.stop)
    result = generate.collect(new_session(script), { stop = "é ₭" }) -- E2 82 AD
    assert.equal("café €!", result.text)
    assert.is_nil(result.stop)
    result = generate.collect(new_session{ "\xC3", "\xA9" }, { stop = { "é" } })
    assert.equal("", result.text)
    assert.equal(2, #result.ids)
  end)

  it("waits for the longer of two beginnings", function()
    local stops = { "ab!", "bcd" }
    assert.equal("x", generate.collect(new_session{ "xa", "b", "!" }, { stop = stops }).text)
    assert.equal("xa", generate.collect(new_session{ "xa", "b", "cd" }, { stop = stops }).text)
    assert.equal("xabce", generate.collect(new_session{ "xa", "bc", "e" }, { stop = stops }).text)
    assert.equal("aa", generate.collect(new_session{ "aa", "ab", "!" }, { stop = stops }).text)
  end)

  it("takes other stop ids instead of the model's", function()
    local session = new_session{ "a", "<eos>", "b" }
    local result = generate.collect(session, { stop_ids = { 3 } })
    assert.equal("a", result.text)
    assert.equal(3, result.stop_id)
    result = generate.collect(new_session{ "a", "<eos>", "b" }, { stop_ids = {}, max_tokens = 5 })
    assert.equal("ab", result.text)
    assert.equal("length", result.finish_reason)
  end)

  it("stops when the context is full", function()
    local session = new_session({ "a", "b", "E", "N" }, { ctx = 5 })
    local result = generate.collect(session, { stop = "EN" })
    assert.equal("abE", result.text)
    assert.equal("context", result.finish_reason)
    assert.equal(5, #session.evaluated)
    assert.equal(0, #generate.collect(session).ids)
  end)

  it("may be asked for nothing", function()
    local result = generate.collect(new_session{ "a" }, { max_tokens = 0 })
    assert.equal("", result.text)
    assert.equal("length", result.finish_reason)
  end)

  it("never takes ids that are no tokens", function()
    local session = new_session({ "a", "b" }, { padding = 7 })
    assert.equal("ab", generate.collect(session, { temperature = 0 }).text)
    assert.equal("ab", generate.collect(new_session({ "a", "b" }, { padding = 7 })).text)
  end)

  it("follows generation_config.json unless told otherwise", function()
    local config = { do_sample = true, temperature = 1, top_k = 2 }
    local function policy(options)
      local session = new_session({ "a" }, { generation_config = config })
      return generate.tokens(session, options).policy
    end
    assert.equal(1, #policy().stages) -- temperature 1 does nothing
    assert.equal(2, #policy{ temperature = 0.5, seed = 4 }.stages)
    assert.equal(4, policy{ temperature = 0.5, seed = 4 }:seed())
    assert.equal(0, #policy{ top_k = 0 }.stages)
    config = { do_sample = true, top_p = -1 }
    local result, message, code = generate.collect(
      new_session({ "a" }, { generation_config = config }))
    assert.is_nil(result)
    assert.matches("generation_config.json: top_p", message)
    assert.equal("format", code)
  end)

  it("repeats itself for a seed", function()
    local function run(seed)
      local options = { temperature = 20, seed = seed, max_tokens = 20, stop_ids = {} }
      return generate.collect(new_session({ "a", "b", "c" }), options).ids
    end
    assert.same(run(3), run(3))
    assert.not_same(run(3), run(4))
  end)

  it("gives a policy the ids, the text so far and a place for its state", function()
    local seen = {}
    local policy = sampler{
      function(c, ctx)
        ctx.state.n = (ctx.state.n or 0) + 1
        seen[#seen + 1] = table.concat(ctx.prompt_ids, ",") .. "|"
          .. table.concat(ctx.output_ids, ",") .. "|" .. ctx.text .. "|" .. ctx.state.n
        c:keep(1)
      end,
    }
    generate.collect(new_session({ "a", "b" }, { prompt = { 1, 0, 1 } }), { sampler = policy })
    assert.same({ "1,0,1|||1", "1,0,1|2|a|2", "1,0,1|2,3|ab|3" }, seen)
  end)

  it("tells the policy what was accepted, and starts it over for a seed", function()
    local accepted, resets = {}, 0
    local stage = {
      apply = function(_, c) c:keep(1) end,
      accept = function(_, id) accepted[#accepted + 1] = id end,
      reset = function() resets = resets + 1 end,
    }
    local policy = sampler{ stage }
    generate.collect(new_session{ "a", "b" }, { sampler = policy, seed = 8 })
    assert.same({ 2, 3 }, accepted)
    assert.equal(1, resets)
    assert.equal(8, policy:seed())
  end)

  it("lists alternatives", function()
    local gen = generate.tokens(new_session{ "a", "b" }, { top_logprobs = 2 })
    local tok = gen()
    assert.equal(2, #tok.top)
    assert.equal(tok.id, tok.top[1].id)
    assert.near(tok.logprob, tok.top[1].logprob, 1e-9)
    assert.equal(1, tok.top[2].id)
    assert.near(tok.logprob - 7, tok.top[2].logprob, 1e-9)
    assert.same({}, generate.tokens(new_session{ "a" }, { top_logprobs = 0 })().top)
  end)

  it("collects, calling back for each token", function()
    local shown = {}
    local options = { on_token = function(tok) shown[#shown + 1] = tok.text end }
    local result = generate.collect(new_session{ "a", "b" }, options)
    assert.same({ "a", "b" }, shown)
    assert.equal("ab", result.text)
    assert.equal(2, #result.logprobs)
    assert.is_function(options.on_token)
  end)

  it("works without a tokenizer", function()
    local session = new_session{ "a", "b" }
    local ids = session.script_ids
    session.model.tokenizer = nil
    local result = generate.collect(session, { max_tokens = 2 })
    assert.same(ids, result.ids)
    assert.equal("", result.text)
    assert.error_matches(function() generate.tokens(session, { stop = "x" }) end, "no tokenizer")
  end)

  it("reports failures of the session and of the logits", function()
    local opts = { fail_at = 2, fail_message = "disk on fire", fail_code = "io" }
    local result, message, code = generate.collect(new_session({ "a", "b" }, opts))
    assert.is_nil(result)
    assert.equal("disk on fire", message)
    assert.equal("io", code)
    local gen = generate.tokens(new_session({ "a", "b" }, opts))
    assert.error_matches(function() texts(gen) end, "disk on fire")
    assert.equal("error", gen.finish_reason)
    result, message, code = generate.collect(new_session({ "a", "b" }, { nan_at = 2 }))
    assert.is_nil(result)
    assert.equal("logits are NaN at id 0", message)
    assert.equal("range", code)
  end)

  it("ends quietly when cancelled", function()
    local opts = { fail_at = 2, fail_message = "cancelled", fail_code = "cancelled" }
    local gen = generate.tokens(new_session({ "a", "bE", "c" }, opts), { stop = "END" })
    assert.same({ "a", "b", "E" }, texts(gen))
    assert.equal("cancelled", gen.finish_reason)
    assert.is_number(gen.pending)
  end)

  it("raises on wrong options", function()
    local session = new_session{ "a" }
    for options, message in pairs{
      [{ temp = 1 }] = "unknown option 'temp'",
      [{ temperature = -1 }] = "temperature: %-1 is not in",
      [{ max_tokens = 1.5 }] = "option 'max_tokens': integer expected",
      [{ max_tokens = -1 }] = "option 'max_tokens': 0 or more",
      [{ stop = 5 }] = "option 'stop'",
      [{ stop = { "" } }] = "option 'stop'",
      [{ stop = "\xFF" }] = "option 'stop'",
      [{ stop_ids = { "<eos>" } }] = "option 'stop_ids': token ids expected",
      [{ sampler = sampler{}, top_k = 3 }] = "option 'top_k': belongs into the sampler",
      [{ sampler = 1 }] = "option 'sampler': table expected",
      [{ sampler = {} }] = "option 'sampler': what moonlet.sampler makes",
      [{ seed = "x" }] = "seed: integer expected",
    } do
      assert.error_matches(function() generate.tokens(session, options) end, message)
    end
    local empty = new_session({ "a" }, { prompt = {} })
    assert.error_matches(function() generate.tokens(empty) end, "session is empty")
  end)
end)

describe("generate on the demo model", function()
  local model, prompt
  lazy_setup(function()
    model = assert(require("moonlet.model").open("examples/demo-model", { precision = "exact" }))
    prompt = assert(model:encode("The old fisherman looked at the sea and"))
  end)
  lazy_teardown(function() model:close() end)

  local function session(ctx)
    local ses = assert(model:session{ ctx = ctx or 64 })
    assert(ses:sync(prompt))
    return ses
  end

  it("takes what argmax takes, and gives the text that decoding gives", function()
    local ses <close> = session()
    local ids, logprobs = {}, {}
    for i = 1, 6 do
      local logits = ses:logits()
      ids[i] = logits:argmax()
      logprobs[i] = logits:logprob(ids[i])
      assert(ses:step(ids[i]))
    end
    local other <close> = session()
    local result = assert(other:generate{ temperature = 0, max_tokens = 6, stop_ids = {} })
    local text, got = {}, {}
    for tok in result do
      text[#text + 1] = tok.text
      got[#got + 1] = tok.logprob
    end
    assert.same(ids, result.ids)
    assert.same(logprobs, got)
    assert.equal(assert(model:decode(ids, { skip_special = true })), table.concat(text))
    assert.equal(ses:n_past(), other:n_past())
  end)

  it("repeats itself for a seed with the checkpoint's own settings", function()
    local function run(seed)
      local ses <close> = session()
      return assert(generate.collect(ses, { seed = seed, max_tokens = 6 }))
    end
    local a, b = run(5), run(5)
    assert.same(a, b)
    assert.not_same(a.ids, run(6).ids)
  end)

  it("refuses logits of an earlier step", function()
    local ses <close> = session()
    local logits = ses:logits()
    assert(ses:step(logits:argmax()))
    assert.error_matches(function() logits:argmax() end, "stale logits")
    assert.error_matches(function() sampler{}:sample(logits) end, "stale logits")
  end)

  it("fills the context and stops", function()
    local ses <close> = session(#prompt + 3)
    local result = generate.collect(ses, { temperature = 0, stop_ids = {} })
    assert.equal("context", result.finish_reason)
    assert.equal(3, #result.ids)
  end)
end)
