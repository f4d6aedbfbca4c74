--- Calibration results that no model made.
local imatrix = require "moonlet.imatrix"
local numbers = require "spec.support.numbers"

local calibration = {}

---An imatrix in which inputs of every matrix differ by a factor of up to 400.
---@param inventory moonlet.Inventory
---@param path string
---@param count (fun(expert: integer): integer)?  tokens that each matrix of a stack met; default 10
---@return moonlet.Imatrix
function calibration.loud_imatrix(inventory, path, count)
  local entries, rng = {}, numbers.rng(7)
  for _, t in ipairs(inventory.source.tensors) do
    if t.part == "text" and t.matrix and t.layer then
      local n_mat = #t.shape == 3 and t.shape[1] or 1
      local sums, counts = {}, {}
      for i = 1, n_mat do counts[i] = count and n_mat > 1 and count(i - 1) or 10 end
      for i = 1, n_mat * t.cols do
        sums[i] = counts[(i - 1) // t.cols + 1] * math.exp(6 * rng.uniform() - 3)
      end
      entries[#entries + 1] = { name = t.name, n_in = t.cols, n_mat = n_mat,
        sums2 = numbers.pack(sums), counts = numbers.pack(counts) }
    end
  end
  assert(imatrix.write(path, entries, { numbers = inventory.numbers }))
  return assert(imatrix.read(path, inventory.numbers))
end

return calibration
