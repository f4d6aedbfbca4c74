-- Compares KL divergences with those of stock transformers' logits.
local golden = require "spec.support.golden"
local moonlet = require "moonlet"
local oracle = require "spec.support.oracle"

local P <const>, Q <const> = "spec/golden/models/moe-text/hf", "spec/golden/models/dense-text/hf"

describe("transformers #oracle", function()
  it("sees the same KL divergence between two models", function()
    local ids, targets, scored = {}, {}, {}
    for i = 1, 64 do
      ids[i] = (i * 7919 + i * i * 31) % 256
      targets[i], scored[i] = i, i
    end
    local out = os.tmpname()
    local pipe = assert(io.popen(("%s spec/oracle/kld.py %s %s %s %s 2>&1"):format(
      oracle.python(), table.concat(ids, ","), P, Q, out)))
    local said = pipe:read("a")
    assert(pipe:close(), said)
    local want = golden.open(out)
    os.remove(out)

    local p <close> = assert(moonlet.open(P, { precision = "exact" }))
    local q <close> = assert(moonlet.open(Q, { precision = "exact" }))
    local theirs <close> = assert(p:session { ctx = 64 })
    local mine <close> = assert(q:session { ctx = 64 })
    local got = assert(q:compare(assert(mine:final(ids, targets)), p,
      assert(theirs:final(ids, targets)), scored))
    assert.same(want.top, golden.ints(got.top))
    assert.same(want.reference_top, golden.ints(got.reference_top))
    local kl = golden.floats(got.kl)
    for i, v in ipairs(want.kl) do assert.near(v, kl[i], 1e-5 * v) end
  end)
end)
