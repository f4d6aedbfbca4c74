--- Products of the kernels' variants under precision "fast", for specs of their definition.
local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local fast_linear = {}

---n_x rows of m.cols numbers times a matrix: rows of m.rows.
function fast_linear.run(variant, m, x, n_x, threads)
  return (core.kern_run(variant, "linear",
    { matrix = m, x = x, n_x = n_x, threads = threads, fast = true }))
end

---What the scalar variant gives; raises where another one differs by a bit.
function fast_linear.compare(m, x, n_x, what)
  local expected = fast_linear.run("scalar", m, x, n_x)
  for _, variant in ipairs(core.kernels()) do
    local difference = numbers.difference(expected, fast_linear.run(variant.name, m, x, n_x))
    if difference then
      error(("%s, %s %d bits, %d x %d, %d tokens, %s: %s"):format(variant.name, m.mode, m.bits,
        m.rows, m.cols, n_x, what, difference), 2)
    end
  end
  return expected
end

return fast_linear
