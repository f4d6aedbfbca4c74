-- recipe: loads a recipe, asks it for decisions, and checks what it answers.
--
-- A recipe file is a text chunk that returns function(options, kit), which returns
-- function(tensor) -> decision and, if it likes, its base decision. It runs with the pure part of
-- the standard library only, under an instruction limit; see docs/recipes.md. What a number format
-- can express is checked here, so that a decision that comes out of `recipe:decide` can be carried
-- out.

local options = require "moonlet.options"
local sys = require "moonlet.sys"

local recipe = {}

-- ---- number formats ----------------------------------------------------------------------------

-- Widths and groups that MLX's kernels exist for (mlx/ops.cpp, quantization_params), and fp8 under
-- a scale per row, which MLX does not have and compressed-tensors does.
local FORMATS = {
  affine = { bits = { 2, 3, 4, 5, 6, 8 }, groups = { 64, 32, 128 }, group_bytes = 4 },
  mxfp4 = { bits = { 4 }, groups = { 32 }, group_bytes = 1 },
  mxfp8 = { bits = { 8 }, groups = { 32 }, group_bytes = 1 },
  nvfp4 = { bits = { 4 }, groups = { 16 }, group_bytes = 1 },
  fp8 = { bits = { 8 }, whole_rows = true, group_bytes = 2 },
}
local DECISION_KEYS = { mode = true, bits = true, group = true, gptq = true, keep = true,
  drop = true }
local KEPT_BYTES = { bf16 = 2, f16 = 2, f32 = 4 }

local function contains(list, x)
  for _, y in ipairs(list) do
    if x == y then return true end
  end
  return false
end

---Bytes that a tensor takes in the output, scales and biases included.
---@param tensor moonlet.Tensor
---@param decision table
---@return integer
function recipe.bytes(tensor, decision)
  local n = tensor.rows * tensor.cols
  if decision.drop then return 0 end
  if decision.keep then return n * KEPT_BYTES[decision.keep] end
  local group_bytes = FORMATS[decision.mode].group_bytes
  if decision.scales == "F32" then group_bytes = 2 * group_bytes end
  return n * decision.bits // 8 + n // decision.group * group_bytes
end

---"affine 4 g64", "bf16", "dropped".
---@param decision table
---@return string
function recipe.decision_text(decision)
  if decision.drop then return "dropped" end
  if decision.keep then return decision.keep end
  if decision.mode == "fp8" then return "fp8" end
  if decision.mode == "affine" then
    return ("affine %d g%d"):format(decision.bits, decision.group)
  end
  return ("%s g%d"):format(decision.mode, decision.group)
end

-- Packed weights as they are: a decision of the same format that must not encode anything.
local function kept_packed(tensor)
  local p = tensor.packed
  local format = FORMATS[p.mode]
  local problem = p.problem
  if not problem and not contains(format.bits, p.bits) then
    problem = ("%s has no %d-bit form"):format(p.mode, p.bits)
  elseif not problem and format.groups and not contains(format.groups, p.group) then
    problem = ("%s has no group of %d"):format(p.mode, p.group)
  end
  if problem then return nil, "cannot be kept as it is stored: " .. problem end
  return { mode = p.mode, bits = p.bits, group = p.group, scales = p.scales, exact = true }
end

-- The decision with defaults filled in, or nil and what is wrong with it.
local function checked(tensor, d)
  if type(d) ~= "table" then return nil, "a decision (table) expected, got " .. type(d) end
  for k in pairs(d) do
    if not DECISION_KEYS[k] then return nil, ("unknown field '%s' in a decision"):format(k) end
  end
  local kinds = (d.mode ~= nil and 1 or 0) + (d.keep ~= nil and 1 or 0) + (d.drop ~= nil and 1 or 0)
  if kinds ~= 1 then return nil, "a decision has exactly one of mode, keep and drop" end
  if d.mode == nil and (d.bits ~= nil or d.group ~= nil or d.gptq ~= nil) then
    return nil, "bits, group and gptq need a mode"
  end
  if d.gptq ~= nil and type(d.gptq) ~= "boolean" then return nil, "gptq is true or false" end
  if d.drop ~= nil then
    if d.drop ~= true then return nil, "drop is true or absent" end
    if tensor.part == "text" then return nil, "the text stack cannot do without it" end
    return { drop = true }
  end
  if d.keep == "stored" and tensor.packed then return kept_packed(tensor) end
  if d.keep ~= nil then
    local stored = tensor.stored
    if d.keep == "stored" then
      stored = stored or tensor.matrix and tensor.dtype and tensor.dtype:lower()
    elseif d.keep ~= "bf16" then
      return nil, ("keep = %s: \"bf16\" and \"stored\" are known"):format(tostring(d.keep))
    end
    return { keep = stored or "bf16" }
  end
  local format = FORMATS[d.mode]
  if not format then return nil, ("unknown mode %s"):format(tostring(d.mode)) end
  if not tensor.matrix then return nil, "only matrices of the text stack can be quantized" end
  local groups = format.whole_rows and { tensor.cols } or format.groups
  local bits, group = d.bits, d.group or groups[1]
  if bits == nil and #format.bits == 1 then bits = format.bits[1] end
  if not contains(format.bits, bits) then
    return nil, ("%s has no %s-bit form"):format(d.mode, tostring(bits))
  end
  if not contains(groups, group) then
    return nil, ("%s has no group of %s"):format(d.mode, tostring(group))
  end
  if tensor.cols % group ~= 0 then
    return nil, ("rows of %d do not divide into groups of %d"):format(tensor.cols, group)
  end
  return { mode = d.mode, bits = bits // 1, group = group // 1, gptq = d.gptq }
end

-- ---- what recipes are given --------------------------------------------------------------------

-- Building blocks for recipes; all pure.
local kit = {}

kit.widths = FORMATS.affine.bits

-- The smallest affine width that is at least `bits`; the widest if there is none.
function kit.snap(bits)
  for _, b in ipairs(FORMATS.affine.bits) do
    if b >= bits then return b end
  end
  return FORMATS.affine.bits[#FORMATS.affine.bits]
end

function kit.affine(bits, group) return { mode = "affine", bits = bits, group = group } end

function kit.keep() return { keep = "bf16" } end

function kit.stored() return { keep = "stored" } end

function kit.drop() return { drop = true } end

-- Promotion pass: an affine decision of `bits` bits becomes modes[bits], any other stays.
function kit.promote(decision, modes)
  local mode = decision.mode == "affine" and modes[decision.bits]
  return mode and { mode = mode, group = (FORMATS[mode].groups or {})[1] } or decision
end

-- The decision if the tensor's rows divide into its groups, else keep.
function kit.fit(tensor, decision)
  local group = decision.mode and decision.group
  if group and tensor.cols % group ~= 0 then return kit.keep() end
  return decision
end

-- True if the value is in the list.
kit.contains = contains

-- Refuses options: the message reaches the user without a place in the file.
function kit.expect(ok, message)
  if not ok then error(message, 0) end
end

-- ---- sandbox -----------------------------------------------------------------------------------

-- A decision takes a few dozen instructions; this stops loops, within milliseconds.
local MAX_INSTRUCTIONS = 1000000

local function copy(t)
  local c = {}
  for k, v in pairs(t) do c[k] = v end
  return c
end

local function environment()
  local env = { assert = assert, error = error, ipairs = ipairs, next = next, pairs = pairs,
    select = select, tonumber = tonumber, tostring = tostring, type = type, _VERSION = _VERSION,
    math = copy(math), string = copy(string), table = copy(table), utf8 = copy(utf8) }
  env.string.dump = nil
  env.math.random, env.math.randomseed = nil, nil -- a plan is the same every time
  return env
end

-- true and the first two results of f(...), run under the instruction limit; false and the
-- error's text if it raises.
local function limited(f, ...)
  local hook, mask, count = debug.gethook()
  debug.sethook(function() error("runs too long", 0) end, "", MAX_INSTRUCTIONS)
  local ok, result, second = pcall(f, ...)
  if hook then debug.sethook(hook, mask, count) else debug.sethook() end
  if ok then return true, result, second end
  return false, tostring(result)
end

-- ---- loading -----------------------------------------------------------------------------------

-- A name is a file of its own or one of moonlet's recipes.
local function path_of(name)
  if name:find("%.lua$") or name:find("/", 1, true) then return name end
  local dir = name:find("^[%w_-]+$") and sys.data_dir("recipes")
  return dir and ("%s/%s.lua"):format(dir, name)
end

local function read_source(name)
  local path = path_of(name)
  if not (path and sys.exists(path)) then
    return nil, ("no recipe named %s (and no such file)"):format(name), "io"
  end
  local text, message, code = sys.read_file(path)
  if not text then return nil, "recipe " .. message, code end
  return text, path
end

---@class moonlet.Recipe
---@field name string
---@field text string?   of its file
---@field options table
---@field base table?  the decision that its options ask for, before any rule of its own
local Recipe = {}
Recipe.__index = Recipe

---The checked decision for one tensor.
---@param tensor moonlet.Tensor
---@return table? decision
---@return string? message
---@return string? code
function Recipe:decide(tensor)
  local shown = copy(tensor)
  shown.shape, shown.packed = copy(tensor.shape), tensor.packed and copy(tensor.packed)
  local ok, answer = limited(self.decider, shown)
  if not ok then
    return nil, ("recipe %s: %s: %s"):format(self.name, tensor.name, answer), "format"
  end
  local decision, problem = checked(tensor, answer)
  if not decision then
    return nil, ("recipe %s: %s %s: %s"):format(self.name, tensor.name,
      "[" .. table.concat(tensor.shape, ", ") .. "]", problem), "range"
  end
  return decision
end

-- What a base decision has to suit.
local ANY_MATRIX = { part = "text", matrix = true, cols = 128 }

local OPTIONS = { bits = "integer", group = "integer", mode = "string", mxfp = "boolean" }

---Loads a recipe by name or file and fixes its options. A function(tensor) -> decision is taken
---as a recipe without options.
---@param source string|function|moonlet.Recipe
---@param given { bits: integer?, group: integer?, mode: string?, mxfp: boolean? }?  options
---@return moonlet.Recipe? recipe
---@return string? message
---@return string? code
function recipe.load(source, given)
  if getmetatable(source) == Recipe then return source end
  given = options.check(given, OPTIONS)
  if type(source) == "function" then
    if next(given) then options.misuse("a recipe given as a function takes no options") end
    return setmetatable({ name = "function", options = {}, decider = source }, Recipe)
  end
  if type(source) ~= "string" then
    options.misuse("recipe: name, file or function expected, got " .. type(source))
  end

  local text, path, code = read_source(source)
  if not text then return nil, path, code end
  local chunk, problem = load(text, "=" .. path, "t", environment())
  if not chunk then return nil, ("recipe %s: %s"):format(source, problem), "format" end
  local ok, build = limited(chunk)
  if ok and type(build) ~= "function" then
    ok, build = false, "must return function(options, kit), returned " .. type(build)
  end
  local decider, base
  if ok then
    ok, decider, base = limited(build, copy(given), copy(kit))
    if ok and type(decider) ~= "function" then
      ok, decider = false, "function(options, kit) must return a function, returned "
        .. type(decider)
    end
  end
  if ok and base ~= nil then
    base, problem = checked(ANY_MATRIX, base)
    if not base then ok, decider = false, "base decision: " .. problem end
  end
  if not ok then
    return nil, ("recipe %s: %s"):format(source, decider or build), "format"
  end
  return setmetatable({ name = source, text = text, options = copy(given), decider = decider,
    base = base }, Recipe)
end

return recipe
