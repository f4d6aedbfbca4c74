-- Reads and compares what spec/golden/sampling/make.py writes; its README says what is in it.
local core = require "moonlet.core"
local json = require "moonlet.json"
local sampler = require "moonlet.sampler"

local cases = {}

function cases.read(path)
  local file = assert(io.open(path, "rb"))
  local doc = assert(json.decode(file:read("a")))
  file:close()
  local vectors = {}
  for _, vector in ipairs(doc.vectors) do
    local packed = {}
    for i, x in ipairs(vector.logits) do
      packed[i] = string.pack("<f", math.type(x) and x or -math.huge)
    end
    local tensor = core.tensor("f32", { 1, #packed }, table.concat(packed))
    vectors[vector.name] = {
      logits = tensor:row(1), prompt = vector.prompt, output = vector.output,
    }
  end
  return { vectors = vectors, cases = doc.cases }
end

-- What the policy of a case leaves: seen by one more stage at its end.
local function left(case, vector)
  local options, out = {}, { ids = {}, probs = {} }
  for name, value in pairs(case.params) do options[name] = value end
  local policy = sampler.from_options(options)
  table.insert(policy.stages, { apply = function(c)
    out.count, out.entropy = #c, c:entropy()
    for i = 1, math.min(#case.ids, #c) do out.ids[i], out.probs[i] = c:id(i), c:p(i) end
  end })
  assert(policy:sample(vector.logits, { prompt_ids = vector.prompt, output_ids = vector.output }))
  return out
end

local function near(want, got, what)
  local bound = math.max(1e-5 * math.abs(want), 1e-7)
  assert(math.abs(want - got) <= bound, ("%s: %.9g, not %.9g"):format(what, got, want))
end

-- Raises where the policy leaves other ids than the case, or with other probabilities.
function cases.check(case, vector)
  local got = left(case, vector)
  assert(got.count == case.count, ("%d ids are left, not %d"):format(got.count, case.count))
  near(case.entropy, got.entropy, "entropy")
  for k, p in ipairs(case.probs) do
    near(p, got.probs[k], "probability " .. k)
    assert(case.ties_at_cut or got.ids[k] == case.ids[k], ("id %d is %d, not %d"):format(k,
      got.ids[k], case.ids[k]))
  end
end

return cases
