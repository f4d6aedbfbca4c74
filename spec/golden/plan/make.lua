-- Decision snapshots: every decision of a recipe for a published model, options side by side.
--
-- `lua5.4 spec/golden/plan/make.lua` after a build rewrites the files beside it, to be reviewed as
-- a diff; spec/plan_spec.lua compares them with what the recipes decide now.

local make = {}

make.folder = "spec/golden/plan/"
make.models = { "qwen3.6-27b", "qwen3.6-35b-a3b" }
make.recipes = {
  unsloth = {
    { label = "2", bits = 2 }, { label = "3", bits = 3 }, { label = "4", bits = 4 },
    { label = "5", bits = 5 }, { label = "6", bits = 6 }, { label = "8", bits = 8 },
    { label = "2 mxfp", bits = 2, mxfp = true }, { label = "3 mxfp", bits = 3, mxfp = true },
    { label = "4 mxfp", bits = 4, mxfp = true }, { label = "5 mxfp", bits = 5, mxfp = true },
    { label = "6 mxfp", bits = 6, mxfp = true }, { label = "8 mxfp", bits = 8, mxfp = true },
    { label = "nvfp4", mode = "nvfp4" },
  },
}

-- "affine 4 g64" -> "4a", "mxfp4 g32" -> "mxfp4": groups follow from the mode unless written.
local function short(d)
  if d.drop then return "drop" end
  if d.keep then return d.keep end
  if d.mode ~= "affine" then return d.mode end
  return d.bits .. "a" .. (d.group ~= 64 and "g" .. d.group or "")
end

-- 0, 1, 2, 4 -> "0-2,4"
local function ranges(numbers)
  local out, i = {}, 1
  while i <= #numbers do
    local last = i
    while numbers[last + 1] == numbers[last] + 1 do last = last + 1 end
    out[#out + 1] = last == i and tostring(numbers[i])
      or ("%d-%d"):format(numbers[i], numbers[last])
    i = last + 1
  end
  return table.concat(out, ",")
end

local function key_of(tensor)
  if tensor.class == "vision" then return "model.visual.**" end
  if tensor.class == "mtp" then return "mtp.**" end
  local head, index, tail = tensor.name:match("^(.-%.)(%d+)(%..*)$")
  if not head then return tensor.name end
  return head .. "#" .. tail, math.tointeger(index)
end

---@param plans moonlet.Plan[]  of one model, one per option set
---@param labels string[]
---@return string
function make.text(plans, labels)
  local groups, order, layers = {}, {}, {}
  for i, tensor in ipairs(plans[1].tensors) do
    local cells = {}
    for k, plan in ipairs(plans) do cells[k] = ("%-7s"):format(short(plan.tensors[i].decision)) end
    local decisions = table.concat(cells)
    local key, index = key_of(tensor)
    local id = key .. decisions
    if not groups[id] then
      groups[id] = { key = key, decisions = decisions, numbers = {} }
      order[#order + 1] = groups[id]
    end
    if index then
      table.insert(groups[id].numbers, index)
      layers[key] = (layers[key] or 0) + 1
    end
  end
  local lines = { (("%-7s"):rep(#labels)):format(table.unpack(labels)) }
  for _, group in ipairs(order) do
    local which = #group.numbers == layers[group.key] and "*" or ranges(group.numbers)
    lines[#lines + 1] = group.decisions .. group.key:gsub("#", which)
  end
  return table.concat(lines, "\n"):gsub(" +\n", "\n") .. "\n"
end

---Calls fn(path, text) for every snapshot.
function make.each(fn)
  local plan = require "moonlet.plan"
  for recipe, variants in pairs(make.recipes) do
    for _, model in ipairs(make.models) do
      local plans, labels = {}, {}
      for i, variant in ipairs(variants) do
        labels[i] = variant.label
        plans[i] = assert(plan.new(recipe, "spec/golden/configs/" .. model .. ".json",
          { bits = variant.bits, mxfp = variant.mxfp, mode = variant.mode }))
      end
      fn(("%s%s.%s.txt"):format(make.folder, model, recipe), make.text(plans, labels))
    end
  end
end

if arg and arg[0] and arg[0]:find("golden/plan/make%.lua$") then
  package.path = "./lua/?.lua;" .. package.path
  package.cpath = "./build/?.so;" .. package.cpath
  make.each(function(path, text)
    local f <close> = assert(io.open(path, "wb"))
    f:write(text)
  end)
end

return make
