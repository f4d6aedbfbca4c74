--- Keys and values as the kernels of attention read them.
local numbers = require "spec.support.numbers"

local PAGE <const> = 32

---Rows [n][dim] as pages of 32 positions, each key's dimensions 32 apart; the last page is filled
---up with `rest`, NaN if not given: what no position owns must not matter.
---@param rows number[]
---@param dim integer
---@param n integer
---@param is_keys? boolean
---@param rest? number
---@return string[] pages f32
return function(rows, dim, n, is_keys, rest)
  local pages = {}
  for first = 0, n - 1, PAGE do
    local page = {}
    for i = 1, PAGE * dim do page[i] = rest or 0 / 0 end
    for j = first, math.min(n, first + PAGE) - 1 do
      for d = 0, dim - 1 do
        local at = is_keys and d * PAGE + j - first or (j - first) * dim + d
        page[at + 1] = rows[j * dim + d + 1]
      end
    end
    pages[#pages + 1] = numbers.pack(page)
  end
  return pages
end
