-- The public surface as CONTRIBUTING.md and the README document it: every name is there, takes the
-- options it says and no others, answers failures of the world with nil, message, code and raises
-- on misuse, at the line of the script that made it.
local moonlet = require "moonlet"

local MODEL <const> = "spec/golden/models/moe-wrapped/hf"
local DEMO <const> = "examples/demo-model"

local function has_methods(object, names)
  for _, name in ipairs(names) do
    assert(type(object[name]) == "function", "no method " .. name)
  end
end

-- Raises at a line of this file with a message that contains `text`.
local function misuse(text, fn)
  local ok, message = pcall(fn)
  assert(not ok, "did not raise: " .. text)
  assert(message:find(text, 1, true), ("'%s' instead of '%s'"):format(message, text))
  assert(message:find("^[%w/.]*api_spec%.lua:%d+: "), "raised elsewhere: " .. message)
end

local function raises(text, fn)
  local ok, message = pcall(fn)
  assert(not ok, "did not raise: " .. text)
  assert(message:find(text, 1, true), ("'%s' instead of '%s'"):format(message, text))
end

local function fails(code, result, message, got)
  assert.is_nil(result)
  assert.is_string(message)
  assert.is_nil(message:find("\n", 1, true))
  assert.equal(code, got)
end

describe("the public table", function()
  it("has what is documented", function()
    for _, name in ipairs { "open", "tokenizer", "quantize_tensor", "dequantize_tensor" } do
      assert.is_function(moonlet[name], name)
    end
    for _, name in ipairs { "plan", "quantize", "sampler" } do
      assert.is_function(getmetatable(moonlet[name]).__call, name)
    end
    for _, name in ipairs { "kld", "perplexity", "report", "save_logits", "sensitivity" } do
      assert.is_function(moonlet.eval[name], name)
    end
    has_methods(moonlet.bench, { "bandwidth", "run" })
    has_methods(moonlet.imatrix, { "read", "write" })
    assert.is_function(getmetatable(moonlet.imatrix).__call)
    has_methods(moonlet.jinja, { "compile" })
    has_methods(moonlet.json, { "decode", "encode", "read", "array", "object" })
    has_methods(moonlet.safetensors, { "open", "write" })
    has_methods(moonlet.agent, { "open" })
    has_methods(moonlet.tools, { "list" })
    assert.matches("^%d+%.%d+%.%d+$", moonlet._VERSION)
  end)

  it("has nothing that is not built", function()
    for _, name in ipairs { "grammar", "no_such_thing" } do
      assert.is_nil(moonlet[name], name)
    end
    local known = { kld = true, perplexity = true, report = true, save_logits = true,
      sensitivity = true }
    for name in pairs(moonlet.eval) do assert.is_true(known[name], name) end
  end)
end)

describe("moonlet.open", function()
  it("takes threads and precision", function()
    local model <close> = assert(moonlet.open(MODEL, { threads = 2, precision = "exact" }))
    local info = model:info()
    assert.equal(2, info.threads)
    assert.equal("exact", info.precision)
    local other <close> = assert(moonlet.open(MODEL))
    assert.equal("fast", other:info().precision)
  end)

  it("raises on misuse", function()
    misuse("directory name expected, got nil", function() moonlet.open() end)
    misuse("unknown option 'thread'", function() moonlet.open(MODEL, { thread = 1 }) end)
    misuse("option 'threads': integer expected", function()
      moonlet.open(MODEL, { threads = "2" })
    end)
    misuse("option 'threads': 1 to 1024", function() moonlet.open(MODEL, { threads = 0 }) end)
    misuse("'fast' or 'exact' expected", function() moonlet.open(MODEL, { precision = "f32" }) end)
    misuse("option table expected", function() moonlet.open(MODEL, 2) end)
  end)

  it("answers a directory that holds no model", function()
    fails("io", moonlet.open("no/such/directory"))
    fails("io", moonlet.open("spec"))
  end)
end)

describe("a model", function()
  local model, demo
  lazy_setup(function()
    model = assert(moonlet.open(MODEL, { threads = 2 }))
    demo = assert(moonlet.open(DEMO, { threads = 2 }))
  end)
  lazy_teardown(function()
    model:close()
    demo:close()
  end)

  it("encodes, decodes and renders", function()
    local ids = assert(demo:encode("<|im_end|>\n"))
    assert.is_true(ids[1] > 0)
    assert.is_true(#assert(demo:encode("<|im_end|>\n", { special = false })) > #ids)
    assert.equal("<|im_end|>\n", demo:decode(ids))
    assert.equal("\n", demo:decode(ids, { skip_special = true }))
    local messages = { { role = "user", content = "Hi" } }
    local text = assert(demo:render(messages))
    assert.matches("Hi", text)
    local bare = assert(demo:render(messages, { add_generation_prompt = false }))
    assert.equal(bare, text:sub(1, #bare))
    assert.is_true(#text > #bare)
  end)

  it("says which part is missing", function()
    fails("missing", model:encode("a"))
    fails("missing", model:decode { 1 })
    fails("missing", model:render { { role = "user", content = "Hi" } })
    local info = model:info()
    assert.is_false(info.tokenizer)
    assert.is_false(info.chat_template)
    assert.is_true(demo:info().chat_template)
  end)

  it("raises on misuse", function()
    misuse("text expected, got number", function() demo:encode(5) end)
    misuse("unknown option 'specials'", function() demo:encode("a", { specials = true }) end)
    misuse("list of token ids expected", function() demo:decode("1 2") end)
    raises("entry 2 is not a token id", function() demo:decode { 1, "a" } end)
    misuse("unknown option 'skip'", function() demo:decode({ 1 }, { skip = true }) end)
    misuse("messages must be a list", function() demo:render("Hi") end)
    misuse("unknown option 'wants'", function() model:forward({ 1 }, { wants = {} }) end)
    misuse("option 'want': 'logit' is none of", function()
      model:forward({ 1 }, { want = { "logit" } })
    end)
    misuse("list of token ids expected", function() model:forward("1") end)
    misuse("unknown option 'n_ctx'", function() model:session { n_ctx = 8 } end)
  end)

  it("answers ids and contexts that it does not have", function()
    fails("range", demo:decode { 1 << 20 })
    fails("range", model:forward { 1, 1 << 20 })
    fails("range", model:forward {})
    fails("limit", model:session { ctx = 1 << 20 })
    fails("limit", model:session { ctx = 0 })
    for _, codec in ipairs { "q8", "turbo8v4", "turbo4", "turbo3", "turbo4v2", "nonsense" } do
      fails("unsupported", model:session { kv = codec })
    end
  end)

  it("gives tensors", function()
    local out = assert(model:forward({ 5, 6, 7 }, { want = { "logits", "hidden", "router" } }))
    local info = model:info().config
    assert.same({ 3, info.vocab_size }, out.logits:shape())
    assert.same({ #info.layer_types + 1, 3, info.hidden_size }, out.hidden:shape())
    assert.equal(#info.layer_types, #out.router)
    local k = info.num_experts_per_tok
    assert.same({ 3, k }, out.router[1].ids:shape())
    assert.same({ 3, k }, out.router[1].weights:shape())
    assert.is_nil(out.mtp)
    local bytes = out.logits:bytes()
    assert.equal(4 * 3 * info.vocab_size, #bytes)
    assert.equal(out.logits:at(2, 3), string.unpack("<f", bytes, 4 * (info.vocab_size + 2) + 1))
    local ids, values = out.logits:row(3):topk(2)
    assert.equal(values[1], out.logits:at(3, ids[1] + 1))
    assert.is_true(values[1] >= values[2])
    assert.is_nil(model:forward({ 1 }, { want = { "router" } }).logits)
    raises("index 4 is not in 1..3", function() out.logits:row(4) end)
  end)

  it("opens sessions with a codec", function()
    local ses <close> = assert(model:session { ctx = 16, kv = "f32" })
    assert.equal("f32", ses:stats().codec)
    assert.equal(16, ses:n_ctx())
    local default <close> = assert(model:session())
    assert.equal("f16", default:stats().codec)
    assert.equal(model:info().config.max_position_embeddings, default:n_ctx())
    local exact <close> = assert(moonlet.open(MODEL, { threads = 1, precision = "exact" }))
    local full <close> = assert(exact:session { ctx = 8 })
    assert.equal("f32", full:stats().codec)
  end)
end)

describe("a session", function()
  local model
  lazy_setup(function() model = assert(moonlet.open(MODEL, { threads = 2 })) end)
  lazy_teardown(function() model:close() end)

  local function session(ids)
    local ses = assert(model:session { ctx = 16 })
    if ids then assert(ses:sync(ids)) end
    return ses
  end

  local function values(ses)
    return select(2, ses:logits():topk(320))
  end

  it("evaluates only what is new", function()
    local ses <close> = session()
    assert.same({ 0, 3 }, { ses:sync { 1, 2, 3 } })
    local there = values(ses)
    assert.same({ 3, 0 }, { ses:sync { 1, 2, 3 } })
    assert.same(there, values(ses))
    assert.same({ 3, 2 }, { ses:sync { 1, 2, 3, 4, 5 } })
    assert.same({ 1, 2, 3, 4, 5 }, ses:ids())
    local fresh <close> = session { 1, 2, 3, 4, 5 }
    assert.same(values(fresh), values(ses))
  end)

  it("starts over when ids are shorter or differ", function()
    local ses <close> = session { 1, 2, 3, 4 }
    local view = ses:logits()
    assert.same({ 0, 2 }, { ses:sync { 1, 2 } })
    raises("stale logits", function() view:argmax() end)
    local fresh <close> = session { 1, 2 }
    assert.same(values(fresh), values(ses))
    assert.same({ 0, 3 }, { ses:sync { 1, 9, 3 } })
    assert.same({ 0, 0 }, { ses:sync {} })
    assert.equal(0, ses:n_past())
    raises("no logits", function() ses:logits() end)
  end)

  it("is left as it was by ids that do not fit", function()
    local ses <close> = session { 1, 2, 3 }
    local there = values(ses)
    local long = {}
    for i = 1, 17 do long[i] = 5 end
    fails("limit", ses:sync(long))
    fails("range", ses:sync { 1, 2, 320 })
    fails("range", ses:sync { 1, 2, 3, -1 })
    fails("range", ses:step(320))
    assert.same({ 1, 2, 3 }, ses:ids())
    assert.same(there, values(ses))
  end)

  it("forks, and comes back to a snapshot", function()
    local ses <close> = session { 1, 2, 3 }
    local there = values(ses)
    local snapshot <close> = assert(ses:snapshot())
    local fork <close> = assert(ses:fork())
    assert.same(there, values(fork))
    assert(ses:step(9))
    assert.same({ 1, 2, 3 }, fork:ids())
    assert.same(there, values(fork))
    assert(fork:step(9))
    assert.same(values(ses), values(fork))
    local view = ses:logits()
    assert(ses:restore(snapshot))
    raises("stale logits", function() view:argmax() end)
    assert.same(there, values(ses))
  end)

  it("has logits that can be read and changed", function()
    local ses <close> = session { 1, 2, 3 }
    local logits = ses:logits()
    has_methods(logits, { "argmax", "topk", "logprob", "entropy", "bias", "mask", "ban" })
    local best = logits:argmax()
    assert.equal(best, logits:topk(1)[1])
    assert.is_true(logits:logprob(best) < 0)
    logits:ban { best }
    local second = logits:argmax()
    assert.not_equal(best, second)
    assert.equal(7, logits:mask { 7, 8 }:ban { 8 }:argmax())
    assert.equal(0, logits:entropy())
  end)

  it("scores what follows", function()
    local ses <close> = session { 1, 2 }
    local want = { -ses:logits():logprob(7), 0, 0 }
    local fresh <close> = session()
    local nll = assert(fresh:score({ 1, 2, 7 }, { -1, 7, -1 }))
    assert.same({ 3 }, nll:shape())
    assert.equal(0, nll:at(1))
    assert.near(want[1], nll:at(2), 1e-5)
    fails("range", fresh:score({ 1 }, { 320 }))
  end)

  it("tells what it holds", function()
    local ses <close> = session { 1, 2, 3 }
    local stats = ses:stats()
    assert.equal(3, stats.n_past)
    assert.equal(16, stats.n_ctx)
    assert.is_true(stats.kv_bytes > 0 and stats.state_bytes > 0)
    ses:reset()
    assert.equal(0, ses:n_past())
  end)

  it("raises on misuse", function()
    local ses <close> = session { 1 }
    misuse("list of token ids expected, got string", function() ses:sync("1") end)
    misuse("token id expected, got nil", function() ses:step() end)
    misuse("token id expected, got string", function() ses:step("1") end)
    misuse("list of target ids expected", function() ses:score({ 1 }) end)
    raises("one target for each id", function() ses:score({ 1 }, {}) end)
    raises("snapshot expected", function() ses:restore(ses) end)
    misuse("unknown option 'temp'", function() ses:generate { temp = 1 } end)
    misuse("unknown option 'grammar'", function() ses:generate { grammar = "" } end)
    local empty <close> = session()
    misuse("session is empty", function() empty:generate {} end)
  end)
end)

describe("handles", function()
  local function closed_model()
    local model = assert(moonlet.open(DEMO, { threads = 1 }))
    model:close()
    model:close()
    return model
  end

  it("raise once they are closed", function()
    local model = closed_model()
    for _, method in ipairs { "info", "session" } do
      raises("closed model", function() model[method](model) end)
    end
    raises("closed model", function() model:forward { 1 } end)
    raises("tokenizer is closed", function() model:encode("a") end)
  end)

  it("close in any order", function()
    local model = assert(moonlet.open(DEMO, { threads = 1 }))
    local ses = assert(model:session { ctx = 8 })
    assert(ses:sync { 1, 2 })
    local snapshot = assert(ses:snapshot())
    local generation = ses:generate { max_tokens = 3 }
    generation()
    model:close()
    raises("closed model", function() ses:step(1) end)
    generation:close()
    ses:close()
    ses:close()
    raises("closed session", function() ses:stats() end)
    snapshot:close()
    snapshot:close()
  end)

  it("work with <close>", function()
    local model <close> = assert(moonlet.open(DEMO, { threads = 1 }))
    local ses <close> = assert(model:session { ctx = 8 })
    assert(ses:sync { 1, 2 })
    local tok <close> = assert(moonlet.tokenizer(DEMO))
    local file <close> = assert(moonlet.safetensors.open(MODEL))
    local out = assert(model:forward { 1 })
    for _, handle in ipairs {
      model, ses, tok, file, out.logits, ses:snapshot(), tok:stream(), ses:generate(),
    } do
      assert.is_function(handle.close)
      assert.is_function(getmetatable(handle).__close)
    end
    do
      local logits <close> = out.logits
      assert.equal(1, #logits)
    end
    raises("closed", function() out.logits:shape() end)
  end)
end)

describe("moonlet.tokenizer", function()
  it("needs no weights", function()
    local tok <close> = assert(moonlet.tokenizer(DEMO .. "/tokenizer.json"))
    local ids = assert(tok:encode("Größe 🌙"))
    assert.equal("Größe 🌙", tok:decode(ids))
    local stream <close> = assert(tok:stream())
    local text = ""
    for _, id in ipairs(ids) do
      local piece = assert(stream:step(id))
      assert.is_truthy(utf8.len(piece))
      text = text .. piece
    end
    assert.equal("Größe 🌙", text .. stream:finish())
    misuse("unknown option 'special'", function() tok:decode(ids, { special = true }) end)
    misuse("unknown option 'skip'", function() tok:stream { skip = true } end)
    fails("io", moonlet.tokenizer("no/such/tokenizer.json"))
  end)
end)

describe("moonlet.plan and moonlet.quantize", function()
  it("take a recipe, a place and options", function()
    local plan = assert(moonlet.plan("unsloth", DEMO, { bits = 4, mxfp = true }))
    assert.is_true(plan.bits_per_weight > 4 and plan.bits_per_weight < 16)
    assert.is_true(plan.total_bytes > 0 and #plan.tensors > 0)
    local row = plan.tensors[1]
    assert.is_string(row.name)
    assert.is_string(row.class)
    assert.is_table(row.shape)
    assert.is_table(row.decision)
    assert.equal(plan.total_bytes, assert(moonlet.plan("unsloth", DEMO .. "/config.json",
      { bits = 4, mxfp = true })).total_bytes)
    assert.equal("function", assert(moonlet.plan(function() return { keep = "bf16" } end,
      DEMO)).recipe)
  end)

  it("raise on misuse", function()
    misuse("option 'bits': boolean, number, text or a list of them expected", function()
      moonlet.plan("unsloth", DEMO, { bits = print })
    end)
    misuse("directory or config.json expected", function() moonlet.plan("unsloth") end)
    misuse("name, file or function expected", function() moonlet.plan(4, DEMO) end)
    misuse("option 'out' is missing", function()
      moonlet.quantize { source = DEMO, recipe = "unsloth" }
    end)
    misuse("unknown option 'output'", function() moonlet.quantize { output = "x" } end)
    misuse("option 'flavour': metal or cpu expected", function()
      moonlet.quantize { source = DEMO, out = "x", recipe = "unsloth", flavour = "cuda" }
    end)
  end)

  it("answer what cannot be done", function()
    fails("io", moonlet.plan("no_such_recipe", DEMO))
    fails("format", moonlet.plan("unsloth", DEMO, { bit = 4 }))
    fails("io", moonlet.plan("unsloth", "no/such/directory"))
    fails("unsupported", moonlet.quantize { source = DEMO, out = "x", recipe = "unsloth",
      format = "bf16" })
  end)

  it("have their kernels for single tensors", function()
    local bytes = string.pack("<" .. ("f"):rep(64), table.unpack((function()
      local t = {}
      for i = 1, 64 do t[i] = (i - 32) / 8 end
      return t
    end)()))
    local shape = { rows = 1, cols = 64, mode = "affine", bits = 8, group = 64, dtype = "f32" }
    local parts = assert(moonlet.quantize_tensor(bytes, shape))
    assert.equal(64, #parts.weight)
    local back = assert(moonlet.dequantize_tensor(parts, shape))
    for i = 1, 64 do
      assert.near((i - 32) / 8, string.unpack("<f", back, 4 * i - 3), 8 / 255)
    end
    misuse("unknown option 'fits'", function() moonlet.quantize_tensor(bytes, { fits = 1 }) end)
  end)
end)

describe("moonlet.sampler and moonlet.jinja", function()
  it("are what generation and templates are made of", function()
    local policy = moonlet.sampler {
      { "temperature", 0.7 }, { "top_k", 20 }, { "top_p", 0.95 }, function() end, seed = 42,
    }
    has_methods(policy, { "sample", "accept", "reset", "clone" })
    assert.equal(42, policy:seed())
    misuse("unknown stage 'top_q'", function() moonlet.sampler { { "top_q", 1 } } end)
    misuse("unknown option 'sed'", function() moonlet.sampler { sed = 1 } end)
    local compiled = assert(moonlet.jinja.compile("{{ a.b }}!"))
    assert.equal("1!", compiled:render(moonlet.json.decode('{"a": {"b": 1}}')))
    fails("template", moonlet.jinja.compile("{{ a "))
    misuse("unknown option 'names'", function() moonlet.jinja.compile("", { names = "x" }) end)
  end)
end)
