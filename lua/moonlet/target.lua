--- A recipe with a level, brought to a size.

local options = require "moonlet.options"
local plan = require "moonlet.plan"
local recipe = require "moonlet.recipe"

local target = {}

local UNITS <const> = { [""] = 1, B = 1, KB = 1e3, MB = 1e6, GB = 1e9, KIB = 2 ^ 10, MIB = 2 ^ 20,
  GIB = 2 ^ 30 }

---A size as people write it: "15.7GB" and "14.6GiB" are bytes, "3.6bpw" is bits per weight of the
---text stack. Below 1000, a number alone is rather bits than bytes, so it has to say.
---@param text string
---@return { bytes: number?, bits_per_weight: number? }? target
---@return string? message
function target.parse(text)
  local number, unit = tostring(text):match("^%s*([%d.]+)%s*(%a*)%s*$")
  local value = tonumber(number)
  unit = unit and unit:upper()
  if value and value > 0 and not (unit == "" and value < 1000) then
    if unit == "BPW" then return { bits_per_weight = value } end
    if UNITS[unit] then return { bytes = value * UNITS[unit] } end
  end
  return nil, ("'%s' is no size: give 15.7GB, 14.6GiB or 3.6bpw"):format(text)
end

---Whether what a plan writes is within a target.
---@param p moonlet.Plan
---@param goal { bytes: number?, bits_per_weight: number? }
---@return boolean
function target.fits(p, goal)
  if goal.bytes then return p.total_bytes <= goal.bytes end
  return p.bits_per_weight <= goal.bits_per_weight
end

local LOWEST <const>, HIGHEST <const>, STEPS <const> = 0, 80, 40

---The highest level of a recipe that keeps to a size.
---@param name string  of a recipe with an option `level`: more of it is larger
---@param path string  checkpoint directory or config.json
---@param goal { bytes: number?, bits_per_weight: number? }  see parse
---@param given table?  other options of the recipe
---@return table? options  with the level
---@return string? message
---@return string? code
function target.level(name, path, goal, given)
  if type(goal) ~= "table" then options.misuse("target: what target.parse makes expected") end
  local inventory, message, code = plan.inventory(path)
  if not inventory then return nil, message, code end
  local function at(level)
    local all = { level = level }
    for key, value in pairs(given or {}) do all[key] = value end
    local rule, why, kind = recipe.load(name, all)
    if not rule and why:find("no option 'level'", 1, true) then
      return nil, ("recipe %s has no sizes; moonlet and budget have"):format(name), kind
    end
    if not rule then return nil, why, kind end
    local p
    p, why, kind = plan.decide(rule, inventory.source.tensors)
    if not p then return nil, why, kind end
    return target.fits(p, goal), all, p
  end
  local low, high = LOWEST, HIGHEST
  local ok, found, least = at(low)
  if ok == nil then return nil, found, least end
  if not ok then
    return nil, ("%s cannot be that small: its least is %s, %.3f bits per weight"):format(name,
      plan.size_text(least.total_bytes), least.bits_per_weight), "range"
  end
  for _ = 1, STEPS do
    local middle = (low + high) / 2
    local fits, all = at(middle)
    if fits then
      low, found = middle, all
    else
      high = middle
    end
  end
  return found
end

return target
