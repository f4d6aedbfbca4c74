-- KL divergence of predictions, from the definition: logits of whole forward passes (which the
-- specs beside this one hold against transformers), sums in Lua's doubles.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local golden = require "spec.support.golden"
local numbers = require "spec.support.numbers"

local P <const> = "spec/golden/models/moe-text/hf"
local Q <const> = "spec/golden/models/dense-text/hf" -- as many tokens, another width
local OTHER <const> = "spec/golden/models/dense-tied/hf"
local N <const> = 70 -- more than two batches of rows

local ids, targets = {}, {}
for i = 1, N do ids[i] = (i * 7919 + i * i * 31) % 256 end
for i = 1, N do targets[i] = i % 5 == 0 and -1 or (i * 37) % 256 end
local scored = {}
for _, t in ipairs(targets) do
  if t >= 0 then scored[#scored + 1] = t end
end

local function final(model)
  local session <close> = assert(model:session { ctx = N, kv = "f32" })
  return assert(session:final(ids, targets))
end

-- Rows of ln softmax where there is a target, and their best tokens.
local function log_softmax(model)
  local logits = assert(model:forward(ids, { "logits" })).logits
  local values, vocab, rows = golden.floats(logits), logits:shape()[2], {}
  for i = 1, N do
    if targets[i] >= 0 then
      local row = golden.slice(values, (i - 1) * vocab, vocab)
      local top, sum = 1, 0
      for k = 2, vocab do
        if row[k] > row[top] then top = k end
      end
      for k = 1, vocab do sum = sum + math.exp(row[k] - row[top]) end
      local log_z = row[top] + math.log(sum)
      for k = 1, vocab do row[k] = row[k] - log_z end
      row.top = top - 1
      rows[#rows + 1] = row
    end
  end
  return rows
end

local function divergence(p, q)
  local sum = 0
  for k = 1, #p do sum = sum + math.exp(p[k]) * (p[k] - q[k]) end
  return sum
end

describe("kld_compare", function()
  local p, q
  lazy_setup(function()
    p = assert(core.model_open(P, { threads = 2 }))
    q = assert(core.model_open(Q, { threads = 2 }))
  end)
  lazy_teardown(function()
    p:close()
    q:close()
  end)

  it("gives the sum over the vocabulary, both nll and both best tokens", function()
    local lp, lq = log_softmax(p), log_softmax(q)
    local kl, nll_p, nll_q, top_p, top_q = core.kld_compare(q, final(q), p, final(p), scored)
    kl, nll_p, nll_q = golden.floats(kl), golden.floats(nll_p), golden.floats(nll_q)
    top_p, top_q = golden.ints(top_p), golden.ints(top_q)
    assert.equal(#scored, #kl)
    local worst = 0
    for i, target in ipairs(scored) do
      local want = divergence(lp[i], lq[i])
      assert.is_true(want > 0.1)
      worst = math.max(worst, math.abs(kl[i] - want) / want)
      assert.near(-lp[i][target + 1], nll_p[i], 1e-6)
      assert.near(-lq[i][target + 1], nll_q[i], 1e-6)
      assert.equal(lp[i].top, top_p[i])
      assert.equal(lq[i].top, top_q[i])
    end
    assert.is_true(worst <= 1e-7, ("relative error %g"):format(worst)) -- half an ulp of f32
  end)

  it("is exactly 0 for a model and itself", function()
    local kl, _, _, top_p, top_q = core.kld_compare(p, final(p), p, final(p), scored)
    for _, v in ipairs(golden.floats(kl)) do assert.equal(0, v) end
    assert.same(golden.ints(top_p), golden.ints(top_q))
  end)

  it("does not depend on threads", function()
    local a = core.kld_compare(q, final(q), p, final(p), scored):bytes()
    local p1 <close> = assert(core.model_open(P, { threads = 1 }))
    local q3 <close> = assert(core.model_open(Q, { threads = 3 }))
    local b = core.kld_compare(q3, final(q3), p1, final(p1), scored):bytes()
    assert.is_nil(numbers.difference(a, b))
  end)

  it("refuses another vocabulary, and rows that do not fit", function()
    local other <close> = assert(core.model_open(OTHER, { threads = 1 }))
    local kl, message, code = core.kld_compare(other, final(other), p, final(p), scored)
    assert.is_nil(kl)
    assert.equal("the reference has 256 tokens, the model 320", message)
    assert.equal("range", code)
    kl, message, code = core.kld_compare(p, final(p), p, final(p),
      table.move({ 256 }, 1, 1, 1, table.move(scored, 1, #scored, 1, {})))
    assert.is_nil(kl)
    assert.equal("target id 256 at position 0 is not below 256", message)
    assert.equal("range", code)
    assert.error_matches(function()
      core.kld_compare(q, final(p), p, final(p), scored)
    end, "another width")
    assert.error_matches(function()
      core.kld_compare(p, final(p), p, final(p), { 1 })
    end, "one row for each target")
    assert.error_matches(function()
      core.kld_compare(p, assert(core.model_open(P, {})), p, final(p), scored)
    end, "moonlet.tensor expected")
  end)

  it("names whose logits are not finite", function()
    local dir = checkpoint.edited(P, function(tensors)
      local head = tensors["lm_head.weight"]
      head.data = head.data:sub(1, 200) .. "\xc0\x7f" .. head.data:sub(203)
    end)
    local broken <close> = assert(core.model_open(dir, { threads = 1 }))
    checkpoint.remove(dir)
    local kl, message = core.kld_compare(p, final(p), broken, final(broken), scored)
    assert.is_nil(kl)
    assert.equal("the reference's logits at position 0 are not finite", message)
    kl, message = core.kld_compare(broken, final(broken), p, final(p), scored)
    assert.is_nil(kl)
    assert.equal("the model's logits at position 0 are not finite", message)
  end)
end)

describe("a file of reference logits", function()
  local p, q, path
  lazy_setup(function()
    p = assert(core.model_open(P, { threads = 2 }))
    q = assert(core.model_open(Q, { threads = 2 }))
    path = os.tmpname()
    local w = assert(core.reference_create(path, 256, ids, targets, { 30, N - 30 }, "tiny", "12"))
    local session <close> = assert(p:session { ctx = N, kv = "f32" })
    -- in two pieces, of which one ends within a batch
    local first = table.move(ids, 1, 40, 1, {})
    local rest = table.move(ids, 41, N, 1, {})
    assert(w:put(p, session:final(first, table.move(targets, 1, 40, 1, {})),
      table.move(scored, 1, 32, 1, {})))
    assert(w:put(p, session:final(rest, table.move(targets, 41, N, 1, {})),
      table.move(scored, 33, #scored, 1, {})))
    assert(w:finish())
  end)
  lazy_teardown(function()
    p:close()
    q:close()
    os.remove(path)
  end)

  local function open()
    return assert(core.reference_open(path))
  end

  it("knows the texts, the model and its size", function()
    local file <close> = open()
    assert.same({ positions = #scored, vocab = 256, model = "tiny", words = "12" }, file:info())
    local got_ids, got_targets, lengths = file:texts()
    assert.same(ids, got_ids)
    assert.same(targets, got_targets)
    assert.same({ 30, N - 30 }, lengths)
  end)

  it("stands for the model, to p e^2 / 2 for steps of the row's range over 65535", function()
    local file <close> = open()
    local want, nll, _, top = core.kld_compare(q, final(q), p, final(p), scored)
    local got, file_nll, _, file_top = core.kld_compare(q, final(q), file, 1, scored)
    assert.same(golden.floats(nll), golden.floats(file_nll))
    assert.same(golden.ints(top), golden.ints(file_top))
    want, got = golden.floats(want), golden.floats(got)
    for i = 1, #want do assert.near(want[i], got[i], 2e-5 * want[i]) end
    -- what is lost altogether: the model against its own file
    local own = golden.floats((core.kld_compare(p, final(p), file, 1, scored)))
    local rows, worst = log_softmax(p), 0
    for i, kl in ipairs(own) do
      local least = math.min(table.unpack(rows[i], 1, 256))
      worst = math.max(worst, kl / ((least / 65535) ^ 2 / 8)) -- every error half a step
    end
    assert.is_true(worst <= 1, ("%g of the bound"):format(worst))
  end)

  it("is read from any position on", function()
    local file <close> = open()
    local all = golden.floats((core.kld_compare(q, final(q), file, 1, scored)))
    local session <close> = assert(q:session { ctx = N, kv = "f32" })
    assert(session:eval(table.move(ids, 1, 40, 1, {})))
    local tail = assert(session:final(table.move(ids, 41, N, 1, {}),
      table.move(targets, 41, N, 1, {})))
    local rest = golden.floats((core.kld_compare(q, tail, file, 33,
      table.move(scored, 33, #scored, 1, {}))))
    assert.same(golden.slice(all, 32, #scored - 32), rest)
    for _, first in ipairs { 0, 2, #scored + 1, math.mininteger, math.maxinteger } do
      local kl, message, code = core.kld_compare(q, final(q), file, first, scored)
      assert.is_nil(kl)
      assert.matches("are not among the reference's " .. #scored, message)
      assert.equal("range", code)
    end
  end)

  it("is not there until it is finished, nor when it is given up", function()
    local unfinished = os.tmpname()
    os.remove(unfinished)
    local w = assert(core.reference_create(unfinished, 256, ids, targets, { N }, "tiny", "12"))
    assert.is_nil(io.open(unfinished))
    local ok, _, code = w:finish() -- positions are missing
    assert.is_nil(ok)
    assert.equal("range", code)
    assert.is_nil(io.open(unfinished))
    w = assert(core.reference_create(unfinished, 256, ids, targets, { N }, "tiny", "12"))
    w:close()
    assert.is_nil(io.open(unfinished))
    assert.is_nil(io.open(unfinished .. ".partial"))
    assert.error_matches(function() w:finish() end, "closed reference")
  end)

  it("takes no other model's rows and not too many", function()
    local out = os.tmpname()
    local w <close> = assert(core.reference_create(out, 256, { 1 }, { 2 }, { 1 }, "tiny", "0"))
    local other <close> = assert(core.model_open(OTHER, { threads = 1 }))
    local ok, message = w:put(other, final(other), scored)
    assert.is_nil(ok)
    assert.matches("for 256 tokens, the model has 320", message)
    ok, message = w:put(p, final(p), scored)
    assert.is_nil(ok)
    assert.matches("more positions than the file has room for", message)
    os.remove(out)
  end)

  -- Changes one tensor, or drops it; the message that opening then gives.
  local function damaged(name, change)
    local tensors = checkpoint.read(path)
    tensors[name] = change(tensors[name])
    local copy = os.tmpname()
    checkpoint.write(copy, tensors, "moonlet reference")
    local file, message, code = core.reference_open(copy)
    os.remove(copy)
    assert.is_nil(file)
    assert.equal("format", code)
    return message
  end

  local function with_int(i, value)
    return function(t)
      t.data = t.data:sub(1, 4 * i - 4) .. string.pack("<i4", value) .. t.data:sub(4 * i + 1)
      return t
    end
  end

  it("is refused when its parts do not belong together", function()
    for _, name in ipairs { "logprobs", "step", "top", "nll", "ids", "targets", "lengths" } do
      assert.matches("tensor " .. name .. " is missing", damaged(name, function() end))
      assert.matches("tensor " .. name .. " is BF16 of ", damaged(name, function()
        return { dtype = "BF16", shape = { 1 }, data = "\0\0" }
      end))
    end
    assert.matches("different numbers of positions", damaged("step", function()
      return { dtype = "F32", shape = { 1 }, data = "\0\0\0\0" }
    end))
    assert.matches("not as many targets as ids", damaged("targets", function()
      return { dtype = "I32", shape = { 0 }, data = "" }
    end))
    assert.matches("not in the vocabulary", damaged("ids", with_int(3, 256)))
    assert.matches("not in the vocabulary", damaged("ids", with_int(3, -1)))
    assert.matches("not in the vocabulary", damaged("targets", with_int(3, 256)))
    assert.matches("not as many positions as targets", damaged("targets", with_int(3, -1)))
    assert.matches("lengths of no sequence", damaged("lengths", with_int(1, 0)))
    assert.matches("lengths of no sequence", damaged("lengths", with_int(1, 1 << 30)))
    assert.matches("ids of no sequence", damaged("lengths", with_int(1, 29)))
    assert.matches("position 2 has step .* top 256", damaged("top", with_int(3, 256)))
    assert.matches("position 2 has step %-", damaged("step", with_int(3, -1 << 30)))
    assert.matches("position 2 has step %S+, nll inf", damaged("nll", with_int(3, 0x7f800000)))
    assert.matches("position 2 has step %S+, nll %-1", damaged("nll", with_int(3, -0x40800000)))
    assert.matches("position 2 has step 1e%+3", damaged("step", with_int(3, 0x7e967699)))
  end)

  it("is refused where a row is not as it was written", function()
    for tensor, case in pairs {
      logprobs = { function(t)
        t.data = t.data:sub(1, 1024) .. ("\0"):rep(512) .. t.data:sub(1537)
        return t
      end, "its probabilities do not add up to 1" },
      step = { with_int(3, 0), "its probabilities do not add up to 1" },
      nll = { with_int(3, 0x3f800000), "its nll is not that of its target" },
      top = { function(t)
        local best = string.unpack("<i4", t.data, 9)
        return with_int(3, (best + 1) % 256)(t)
      end, "its best token is not the best" },
    } do
      local tensors = checkpoint.read(path)
      tensors[tensor] = case[1](tensors[tensor])
      local copy = os.tmpname()
      checkpoint.write(copy, tensors, "moonlet reference")
      local file <close> = assert(core.reference_open(copy))
      assert.same({ nil, ("%s: position 2 is damaged: %s"):format(copy, case[2]), "format" },
        { core.kld_compare(q, final(q), file, 1, scored) })
      os.remove(copy)
    end
  end)

  it("is refused when it is something else", function()
    local file, message, code = core.reference_open(P .. "/model.safetensors")
    assert.is_nil(file)
    assert.matches("not a file of reference logits", message)
    assert.equal("format", code)
    file, message, code = core.reference_open("no/such/file")
    assert.is_nil(file)
    assert.matches("no/such/file", message)
    assert.equal("io", code)
  end)
end)
