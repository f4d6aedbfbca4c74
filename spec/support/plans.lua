-- Plans as the sections of spec/golden/plan have them.

local recipe = require "moonlet.recipe"

local plans = {}

local function sorted(set)
  local list = {}
  for key in pairs(set) do list[#list + 1] = key end
  table.sort(list)
  return list
end

-- {2, 4, 5} of {0, 1, 2, 4, 5} as "2-5"; nil if it is all.
local function ranges(some, every)
  local out, run, all = {}, {}, true
  local list = sorted(every)
  for i = 1, #list + 1 do
    if some[list[i]] then
      run[#run + 1] = list[i]
    else
      all = all and i > #list
      if #run > 0 then out[#out + 1] = #run == 1 and run[1] or run[1] .. "-" .. run[#run] end
      run = {}
    end
  end
  return not all and table.concat(out, ",") or nil
end

---One line per decision, by label, and one of sums.
---@param p moonlet.Plan
---@return string
function plans.text(p)
  local rows, layers = {}, {}
  for _, t in ipairs(p.tensors) do
    local label = recipe.decision_text(t.decision)
    local layer = math.tointeger(tonumber(t.name:match("^model.*%.layers%.(%d+)%."))) or -1
    local row = rows[label] or { n = 0, bytes = 0, classes = {} }
    rows[label] = row
    row.n, row.bytes = row.n + 1, row.bytes + t.bytes
    row.classes[t.class] = row.classes[t.class] or {}
    row.classes[t.class][layer] = true
    layers[t.class] = layers[t.class] or {}
    layers[t.class][layer] = true
  end
  local lines = {}
  for _, label in ipairs(sorted(rows)) do
    local row, words = rows[label], {}
    for i, class in ipairs(sorted(row.classes)) do
      local which = ranges(row.classes[class], layers[class])
      words[i] = which and ("%s[%s]"):format(class, which) or class
    end
    lines[#lines + 1] = ("%s: %d tensors, %d bytes: %s"):format(label, row.n, row.bytes,
      table.concat(words, " "))
  end
  lines[#lines + 1] = ("text %d bytes, %.4f bits per weight; vision %d, mtp %d"):format(
    p.part_bytes.text, p.bits_per_weight, p.part_bytes.vision, p.part_bytes.mtp)
  return table.concat(lines, "\n") .. "\n"
end

---Name and options of a section's heading, which are those of the command line.
---@param heading string
---@return string recipe
---@return table options
function plans.options(heading)
  local words, options = {}, {}
  for word in heading:gmatch("%S+") do words[#words + 1] = word end
  local i = 2
  while words[i] do
    local key, value = words[i]:match("^%-%-(.*)$"), words[i + 1]
    if key == "set" then key, value = value:match("^(%w+)=(.*)$") end
    if key == "mxfp" then
      options.mxfp, i = true, i + 1
    else
      local list = value:match("^%[(.*)%]$")
      options[key] = math.tointeger(tonumber(value)) or value
      if list then
        options[key] = {}
        for item in list:gmatch('"([^"]*)"') do table.insert(options[key], item) end
      end
      i = i + 2
    end
  end
  return words[1], options
end

return plans
