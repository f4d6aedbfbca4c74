-- The layers that rule mlx-lm of the mixed recipes picks, against stock mlx-lm.

local oracle = require "spec.support.oracle"
local recipe = require "moonlet.recipe"

describe("stock mlx-lm's mixed recipes #oracle", function()
  it("give the same widths to the same layers", function()
    local path, n_lines = os.tmpname(), 0
    oracle.run("mixed.py", { path })
    for line in io.lines(path) do
      local name, n, class, widths = line:match("^(%S+) (%d+) (%S+) (.*)$")
      local rule, got = assert(recipe.load(name, { rule = "mlx-lm" })), {}
      for i = 0, n - 1 do
        got[i + 1] = assert(rule:decide { name = "x.weight", part = "text", class = class,
          shape = { 64, 128 }, rows = 64, cols = 128, layer = i, n_layers = math.tointeger(n),
          matrix = true }).bits
      end
      assert.equal(widths, table.concat(got, " "), line)
      n_lines = n_lines + 1
    end
    os.remove(path)
    assert.equal(4 * 6 * 3, n_lines)
  end)
end)
