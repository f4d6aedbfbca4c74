-- plan: every decision of a recipe with its price, before any weight is read.
--
-- A plan is a plain table (what `moonlet plan --json` prints) with methods in its metatable. From
-- config.json alone it lists what the architecture has; from a directory with weights, what the
-- files hold.

local core = require "moonlet.core"
local json = require "moonlet.json"
local layout = require "moonlet.layout"
local options = require "moonlet.options"
local recipe = require "moonlet.recipe"
local source = require "moonlet.source"

---@class moonlet.Plan
---@field recipe string
---@field options table
---@field parameters integer       of the text stack
---@field bits_per_weight number   of the text stack, scales and biases included
---@field total_bytes integer      of all tensors written
---@field part_bytes table<string, integer>  "text", "vision", "mtp"
---@field tensors { name: string, shape: integer[], class: string, decision: table,
---  bytes: integer }[]
---@field classes table<string, { tensors: integer, parameters: integer, bytes: integer,
---  bits_per_weight: number, decisions: table<string, integer> }>
local Plan = {}
Plan.__index = Plan

local plan = {}

local function is_config(path) return path:find("%.json$") ~= nil end

-- An object inside config.json, or nil.
local function section(config, key)
  local value = config[key]
  return json.is_object(value) and value or nil
end

local function stored_tensors(path)
  local files, message, code = core.st_open(path)
  if not files then return nil, message, code end
  local set <close> = files
  local list = {}
  for i, name in ipairs(set:names()) do
    local info = set:info(name)
    list[i] = { name = name, dtype = info.dtype, shape = info.shape }
  end
  return list
end

-- The matrices that the engine binds, by name.
local function engine_modules(path)
  local bound, message, code = core.model_layout(path)
  if not bound then return nil, message, code end
  local modules = {}
  for _, m in ipairs(bound.modules) do modules[m.name] = m end
  return modules
end

local QUANTIZATION = { "quantization", "quantization_config", "compression_config" }

-- What config.json says of the format of its files does not hold for those written from them; true
-- if it said anything.
local function drop_quantization(config)
  local found = false
  for _, object in ipairs { config, section(config, "text_config") } do
    for _, key in ipairs(QUANTIZATION) do
      found = found or section(object, key) ~= nil
      object[key] = nil
    end
  end
  return found
end

---@class moonlet.Inventory
---@field config table   config.json, decoded, without what it says of quantization
---@field numbers table  of the text stack, as moonlet.core.model_config gives them
---@field source moonlet.Source

---What there is to decide on: the tensors that config.json announces or that the files hold.
---@param path string  a checkpoint directory or a config.json
---@return moonlet.Inventory? inventory
---@return string? message
---@return string? code
function plan.inventory(path)
  local config_path = is_config(path) and path or path .. "/config.json"
  local config, numbers, stored, bound, message, code
  config, message, code = json.read_object(config_path)
  if not config then return nil, message, code end
  numbers, message, code = core.model_config(json.encode(config))
  if not numbers then return nil, message:gsub("^config%.json", config_path), code end
  numbers.wrapped = section(config, "text_config") ~= nil

  if is_config(path) then
    bound, message, code = layout.tensors(numbers, section(config, "vision_config"))
    if not bound then return nil, config_path .. ": " .. message, code end
    bound = { tensors = bound, tied = numbers.tie_word_embeddings }
  else
    local modules
    stored, message, code = stored_tensors(path)
    if not stored then return nil, message, code end
    if drop_quantization(config) or source.is_quantized(stored) then
      modules, message, code = engine_modules(path)
      if not modules then return nil, message, code end
    end
    bound, message, code = source.bind(numbers, stored, modules)
    if not bound then return nil, path .. ": " .. message, code end
    for _, desc in ipairs(bound.tensors) do
      desc.unreadable = desc.unreadable and path .. ": " .. desc.unreadable
    end
  end
  return { config = config, numbers = numbers, source = bound }
end

-- ---- sums --------------------------------------------------------------------------------------

local function add_row(self, row, desc)
  local class = self.classes[row.class]
  if not class then
    class = { tensors = 0, parameters = 0, bytes = 0, decisions = {} }
    self.classes[row.class] = class
  end
  local n, label = desc.rows * desc.cols, recipe.decision_text(row.decision)
  class.tensors = class.tensors + 1
  class.parameters = class.parameters + n
  class.bytes = class.bytes + row.bytes
  class.decisions[label] = (class.decisions[label] or 0) + 1
  self.part_bytes[desc.part] = (self.part_bytes[desc.part] or 0) + row.bytes
  self.total_bytes = self.total_bytes + row.bytes
  if desc.part == "text" then self.parameters = self.parameters + n end
  self.tensors[#self.tensors + 1] = row
end

---Decides on every tensor. `decided` pairs each description with its decision, for the writer.
---@param rule moonlet.Recipe
---@param tensors moonlet.Tensor[]
---@param form? { bytes: function, suited: function? }  that is written, see moonlet.shards;
---  default: MLX
---@return moonlet.Plan? plan
---@return string|{ tensor: moonlet.Tensor, decision: table, note: string? }[] decided_or_message
---@return string? code
function plan.decide(rule, tensors, form)
  form = form or recipe
  local self = setmetatable({ recipe = rule.name, options = rule.options, parameters = 0,
    total_bytes = 0, part_bytes = {}, tensors = {}, classes = {} }, Plan)
  local decided = {}
  for i, desc in ipairs(tensors) do
    local decision, message, code = rule:decide(desc)
    if not decision then return nil, message, code end
    if desc.unreadable and not decision.drop then
      return nil, desc.unreadable .. "; the recipe may drop it", "unsupported"
    end
    local note
    if form.suited then decision, note = form.suited(desc, decision) end
    decided[i] = { tensor = desc, decision = decision, note = note }
    add_row(self, { name = desc.name, shape = desc.shape, class = desc.class, decision = decision,
      bytes = form.bytes(desc, decision) }, desc)
  end
  local ok, message, code = rule:finish()
  if not ok then return nil, message, code end
  for _, class in pairs(self.classes) do
    class.bits_per_weight = class.bytes * 8 / class.parameters
  end
  self.bits_per_weight = self.part_bytes.text * 8 / self.parameters
  return self, decided
end

---Prices a recipe for a checkpoint directory or a config.json; reads no weights.
---@param rule string|function|moonlet.Recipe  name of a published recipe, file.lua, or a function
---@param path string
---@param given table<string, boolean|number|string|table>?  options of the recipe
---@return moonlet.Plan? plan
---@return string? message
---@return string? code
function plan.new(rule, path, given)
  if type(path) ~= "string" then
    options.misuse("plan: directory or config.json expected, got " .. type(path))
  end
  local loaded, message, code = recipe.load(rule, given)
  if not loaded then return nil, message, code end
  local inventory
  inventory, message, code = plan.inventory(path)
  if not inventory then return nil, message, code end
  local self
  self, message, code = plan.decide(loaded, inventory.source.tensors)
  if not self then return nil, message --[[@as string]], code end
  return self
end

-- ---- text --------------------------------------------------------------------------------------

---"20.65 GiB", "812.30 KiB".
---@param bytes integer
---@return string
function plan.size_text(bytes)
  local units, i, x = { "B", "KiB", "MiB", "GiB" }, 1, bytes
  while x >= 1024 and i < #units do
    x, i = x / 1024, i + 1
  end
  return i == 1 and ("%d B"):format(bytes) or ("%.2f %s"):format(x, units[i])
end

---"1,234,567".
---@param n integer
---@return string
function plan.count_text(n)
  local text = ("%d"):format(n):reverse():gsub("(%d%d%d)", "%1,"):reverse()
  return (text:gsub("^,", ""))
end

local function decisions_text(decisions)
  local labels = {}
  for label in pairs(decisions) do labels[#labels + 1] = label end
  table.sort(labels, function(a, b)
    if decisions[a] ~= decisions[b] then return decisions[a] > decisions[b] end
    return a < b
  end)
  if #labels == 1 then return labels[1] end
  for i, label in ipairs(labels) do labels[i] = ("%s x %d"):format(label, decisions[label]) end
  return table.concat(labels, ", ")
end

---The plan as a table by class, largest first, and a line of totals.
---@return string
function Plan:text()
  local names = {}
  for name in pairs(self.classes) do names[#names + 1] = name end
  table.sort(names, function(a, b)
    local x, y = self.classes[a].bytes, self.classes[b].bytes
    if x ~= y then return x > y end
    return a < b
  end)
  local row = "%-17s %8s %15s %12s %7s  %s"
  local lines = { row:format("class", "tensors", "parameters", "size", "bits", "decision") }
  for _, name in ipairs(names) do
    local class = self.classes[name]
    lines[#lines + 1] = row:format(name, class.tensors, class.parameters,
      plan.size_text(class.bytes), ("%.2f"):format(class.bits_per_weight),
      decisions_text(class.decisions))
  end
  lines[#lines + 1] = ("%s: %s, text stack %d parameters at %.3f bits per weight"):format(
    self.recipe, plan.size_text(self.total_bytes), self.parameters, self.bits_per_weight)
  return table.concat(lines, "\n") .. "\n"
end

return setmetatable(plan, { __call = function(_, ...) return plan.new(...) end })
