--- Logits of ours against those that a stock library left beside a checkpoint.
local assert = require "luassert"
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local oracle = require "spec.support.oracle"

local logits = {}

---Forty ids that every golden vocabulary has.
logits.ids = {}
for i = 1, 40 do logits.ids[i] = (i * 7919 + i * i * 31) % 256 end

---Runs a script of spec/oracle for directories; each gets DIR.safetensors with `logits`.
function logits.run(script, dirs)
  oracle.run(script, { table.concat(logits.ids, ","), table.unpack(dirs) })
end

---Largest distance between our logits and theirs, in units of their rms.
function logits.distance(dir)
  local theirs = checkpoint.read(dir .. ".safetensors").logits
  local model = assert(core.model_open(dir, {}))
  local bytes = assert(model:forward(logits.ids, { "logits" })).logits:bytes()
  model:close()
  assert.equal(#theirs.data, #bytes)
  local squares, worst = 0.0, 0.0
  for i = 1, #bytes, 4 do
    local a, b = string.unpack("<f", bytes, i), string.unpack("<f", theirs.data, i)
    squares = squares + b * b
    worst = math.max(worst, a == a and math.abs(a - b) or math.huge)
  end
  return worst / math.sqrt(squares / (#bytes // 4))
end

return logits
