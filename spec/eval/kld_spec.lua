-- moonlet.eval.kld: what it compares and what it makes of the rows (the rows themselves are
-- model/kld_spec's).
local checkpoint = require "spec.support.checkpoint"
local golden = require "spec.support.golden"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local sequences = require "moonlet.sequences"

local DEMO <const> = "examples/demo-model"
local TEXT <const> = "The old fisherman looked at the sea.\nHe had caught nothing for a week, "
  .. "and the wind was turning; still he went down to the boat."

local function turn(role, content) return { role = role, content = content } end

local DIALOGUES <const> = {
  { messages = { turn("user", "Hi"), turn("assistant", "Hello!") } },
  { messages = { turn("user", "What is 1 + 1?"), turn("assistant", "2") } },
  { messages = { turn("user", "And 2 + 3?"), turn("assistant", "5"), turn("user", "Thanks"),
    turn("assistant", "You are welcome.") } },
}

describe("eval.kld", function()
  local model, reference, quantized, chat
  lazy_setup(function()
    quantized = os.tmpname()
    os.remove(quantized)
    assert(moonlet.quantize { source = DEMO, out = quantized, recipe = "uniform",
      mode = "mxfp4" })
    model = assert(moonlet.open(quantized, { threads = 2, precision = "exact" }))
    reference = assert(moonlet.open(DEMO, { threads = 2, precision = "exact" }))
    chat = os.tmpname()
    local lines = {}
    for i, row in ipairs(DIALOGUES) do lines[i] = json.encode(row) .. "\n" end
    checkpoint.spit(chat, table.concat(lines))
  end)
  lazy_teardown(function()
    model:close()
    reference:close()
    checkpoint.remove(quantized)
    os.remove(chat)
  end)

  local function kld(opts)
    opts.reference = opts.reference or not opts.reference_logits and reference or nil
    return assert(moonlet.eval.kld(model, opts))
  end

  it("agrees with the definition over a text", function()
    local ids = assert(model:encode(TEXT, { special = false }))
    local p, q = assert(reference:forward(ids)).logits, assert(model:forward(ids)).logits
    local ps, qs = golden.floats(p), golden.floats(q)
    local result = kld { text = TEXT, positions = true }
    local vocab, same, total, nll = 4160, 0, 0, 0
    local function at_row(i) return (i - 1) * vocab + 1 end
    assert.equal(#ids - 1, result.tokens)
    assert.equal(26, result.words)
    assert.equal(#ids - 1, #result.positions)
    for i = 1, #ids - 1 do
      local sum, lp, lq = 0, p:row(i), q:row(i)
      local zp, zq, at = lp:logprob(0) - ps[at_row(i)], lq:logprob(0) - qs[at_row(i)], at_row(i)
      for k = at, at + vocab - 1 do
        sum = sum + math.exp(ps[k] + zp) * (ps[k] + zp - qs[k] - zq)
      end
      local row = result.positions[i]
      assert.near(sum, row.kld, 1e-6 * sum)
      assert.same({ 1, i, ids[i + 1], lp:argmax(), lq:argmax() }, { row.sequence, row.position,
        row.token, row.reference_top, row.top })
      total, nll = total + sum, nll - lq:logprob(ids[i + 1])
      same = same + (lp:argmax() == lq:argmax() and 1 or 0)
    end
    assert.near(total / (#ids - 1), result.mean, 1e-6 * result.mean)
    assert.equal(same / (#ids - 1), result.top1)
    assert.near(nll, result.nll, 1e-5 * nll)
    assert.equal(DEMO, result.reference)
  end)

  it("says what the residual stream is off by after each layer", function()
    local list = assert(sequences.read(reference, { chat = chat }))
    local error, power = {}, {}
    for _, sequence in ipairs(list) do
      local p = assert(reference:forward(sequence.ids, { want = { "hidden" } }))
      local q = assert(model:forward(sequence.ids, { want = { "hidden" } }))
      local n = #sequence.ids * 256
      for depth = 1, 9 do
        local a, b
        if depth < 9 then
          a = golden.unpack(p.hidden:bytes():sub(4 * n * depth + 1, 4 * n * (depth + 1)), "F32")
          b = golden.unpack(q.hidden:bytes():sub(4 * n * depth + 1, 4 * n * (depth + 1)), "F32")
        else
          a, b = golden.floats(p.final), golden.floats(q.final)
        end
        for i, v in ipairs(a) do
          error[depth] = (error[depth] or 0) + (b[i] - v) ^ 2
          power[depth] = (power[depth] or 0) + v ^ 2
        end
      end
    end
    local layers = kld({ chat = chat }).layers
    assert.equal(9, #layers)
    for depth, v in ipairs(layers) do
      assert.near(math.sqrt(error[depth] / power[depth]), v, 1e-9)
    end
  end)

  it("tells the size of the model and of each matrix, and counts positions by KLD", function()
    local plan = assert(moonlet.plan("uniform", DEMO, { mode = "mxfp4" }))
    local bytes, parameters, by_name = 0, 0, {}
    local result = kld { chat = chat, matrices = true, positions = true }
    for _, m in ipairs(result.matrices) do by_name[m.name] = m end
    for _, tensor in ipairs(plan.tensors) do
      local name = tensor.name:gsub("^model%.language_model%.", ""):gsub("%.weight$", "")
      local m = by_name[name]
      if m then
        assert.same({ tensor.class, tensor.bytes }, { m.class, m.bytes })
        assert.equal(m.bytes * 8 / m.parameters, m.bits)
        bytes, parameters = bytes + m.bytes, parameters + m.parameters
      else
        assert.is_true(tensor.class == "norm" or tensor.class == "decay"
          or tensor.class == "conv" or tensor.decision.drop, name)
      end
    end
    assert.same({ bytes, bytes * 8 / parameters }, { result.bytes, result.bits_per_weight })
    assert.equal("uniform mxfp4", result.label)
    local counts = {}
    for i = 1, 48 do counts[i] = 0 end
    for _, row in ipairs(result.positions) do
      for i = 48, 1, -1 do
        if i == 1 or row.kld >= 10 ^ (-10 + (i - 1) / 4) then
          counts[i] = counts[i] + 1
          break
        end
      end
    end
    assert.same({ least = -10, bins_per_decade = 4, counts = counts }, result.histogram)
  end)

  it("is exactly 0 for a model and itself, and the best tokens are all the same", function()
    local result = assert(moonlet.eval.kld(reference, { reference = reference, chat = chat }))
    for _, name in ipairs { "mean", "mean_error", "median", "p99", "p999", "max" } do
      assert.equal(0, result[name], name)
    end
    assert.equal(1, result.top1)
    assert.equal(result.reference_perplexity, result.perplexity)
  end)

  it("scores what perplexity scores", function()
    for _, opts in ipairs { { text = TEXT, window = 7 }, { chat = chat },
      { chat = chat, dialogues = { 2, 3 } }, { text = TEXT, window = 7, windows = { 2 } } } do
      local both = {}
      for k, v in pairs(opts) do both[k] = v end
      local result = kld(both)
      local mine = assert(moonlet.eval.perplexity(model, opts))
      local theirs = assert(moonlet.eval.perplexity(reference, opts))
      assert.same({ mine.tokens, mine.words }, { result.tokens, result.words })
      assert.near(1, result.perplexity / mine.perplexity, 1e-6)
      assert.near(1, result.reference_perplexity / theirs.perplexity, 1e-6)
    end
  end)

  it("takes a range of dialogues or windows", function()
    local all = kld({ chat = chat, positions = true }).positions
    local some = kld({ chat = chat, dialogues = { 2 }, positions = true }).positions
    assert.is_true(#some < #all)
    for i, row in ipairs(some) do assert.equal(all[#all - #some + i].kld, row.kld) end
    assert.same(some, kld({ chat = chat, dialogues = { 2, 99 }, positions = true }).positions)
    all = kld({ text = TEXT, window = 10, positions = true }).positions
    some = kld({ text = TEXT, window = 10, windows = { 2, 2 }, positions = true }).positions
    assert.equal(9, #some)
    for i, row in ipairs(some) do assert.equal(all[9 + i].kld, row.kld) end
  end)

  it("compares with a file, which knows its text", function()
    local path = os.tmpname()
    local saved = assert(moonlet.eval.save_logits(reference, { chat = chat, out = path }))
    local want = kld { chat = chat }
    assert.same({ want.tokens, want.words }, { saved.tokens, saved.words })
    for _, opts in ipairs { { reference_logits = path },
      { reference_logits = path, chat = chat } } do
      local got = kld(opts)
      assert.near(want.mean, got.mean, 1e-5 * want.mean)
      assert.equal(want.top1, got.top1)
      assert.equal(want.perplexity, got.perplexity)
      assert.equal(want.reference_perplexity, got.reference_perplexity)
      assert.same({ want.tokens, want.words, DEMO }, { got.tokens, got.words, got.reference })
    end
    local result, message, code = moonlet.eval.kld(model, { reference_logits = path,
      chat = chat, dialogues = { 2 } })
    assert.is_nil(result)
    assert.equal(path .. ": sequence 1 is not the same tokens as in the text given", message)
    assert.equal("range", code)
    local tiny <close> = assert(moonlet.open "spec/golden/models/moe-text/hf")
    result, message, code = moonlet.eval.kld(tiny, { reference_logits = path })
    assert.is_nil(result)
    assert.matches("is not below 256", message)
    assert.equal("range", code)
    os.remove(path)
  end)

  it("refuses a reference that reads the text as other tokens", function()
    local dir = checkpoint.directory()
    os.execute(("ln -s $PWD/%s/* %s && rm %s/chat_template.jinja"):format(DEMO, dir, dir))
    checkpoint.spit(dir .. "/chat_template.jinja", "{% for m in messages %}{{ m.content }}"
      .. "<|im_end|>\n{% endfor %}")
    local other <close> = assert(moonlet.open(dir, { precision = "exact" }))
    local result, message, code = moonlet.eval.kld(model, { reference = other, chat = chat })
    checkpoint.remove(dir)
    assert.is_nil(result)
    assert.equal(dir .. " reads sequence 1 as other tokens than " .. quantized, message)
    assert.equal("range", code)
  end)

  it("reports progress in tokens", function()
    local seen = {}
    kld { chat = chat, on_progress = function(done, total) seen[#seen + 1] = { done, total } end }
    assert.is_true(#seen >= #DIALOGUES)
    assert.equal(seen[#seen][1], seen[#seen][2])
  end)

  it("refuses misuse, by raising, and ranges of nothing", function()
    for _, opts in ipairs { {}, { reference = reference }, { text = TEXT }, { reference = reference,
      reference_logits = "x", text = TEXT }, { reference = reference, text = TEXT,
      dialogues = { 1 } }, { reference = reference, chat = chat, windows = { 1 } },
      { reference = reference, chat = chat, dialogues = { 0 } },
      { reference = reference, chat = chat, dialogues = { 3, 2 } },
      { reference = reference, chat = chat, dialogues = {} } } do
      assert.error(function() moonlet.eval.kld(model, opts) end)
    end
    assert.error(function() moonlet.eval.save_logits(model, { text = TEXT }) end)
    local result, message, code = moonlet.eval.kld(model, { reference = reference, chat = chat,
      dialogues = { 4 } })
    assert.is_nil(result)
    assert.equal(chat .. ": there are 3 dialogues, none from 4 on", message)
    assert.equal("range", code)
  end)
end)

describe("statistics", function()
  local statistics = require("moonlet.eval.rows").statistics

  it("are numpy's", function()
    -- np.mean, np.std(ddof=1)/sqrt(n), np.median, np.percentile 99 and 99.9, np.max
    local s = statistics { 0.5, 4, 1, 8, 2 }
    assert.near(3.1, s.mean, 1e-12)
    assert.near(1.3638181696985856, s.mean_error, 1e-12)
    assert.equal(2, s.median)
    assert.near(7.84, s.p99, 1e-12)
    assert.near(7.984, s.p999, 1e-12)
    assert.equal(8, s.max)
  end)

  it("of one value are that value", function()
    assert.same({ mean = 3, mean_error = 0, median = 3, p99 = 3, p999 = 3, max = 3 },
      statistics { 3 })
  end)
end)
