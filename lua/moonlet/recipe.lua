-- recipe: loads a recipe, asks it for decisions, and checks what it answers.
--
-- A recipe file is a text chunk that returns function(options, kit), which returns
-- function(tensor) -> decision and, if it likes, its base decision and its defaults. It runs in a
-- sandbox; see docs/recipes.md. What a number format can express is checked here, so that a
-- decision that comes out of `recipe:decide` can be carried out.

local core = require "moonlet.core"
local guard = require "moonlet.guard"
local options = require "moonlet.options"
local sandbox = require "moonlet.sandbox"
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
local DECISION_FIELDS = { mode = "string", bits = "number", group = "number", keep = "string",
  drop = "boolean", fit = "string", gptq = "boolean" }

---Ways to choose scales, and to fold scales into columns.
recipe.FITS = { "minmax", "mse", "imatrix", "qstream", "best" }
recipe.AWQ = { "search", "mlx-node", "off" }

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

---How scales are chosen: as the decision says, or else as wanted; nil if nobody says. qstream is
---about exponents of mxfp4: as a wish it leaves other modes alone.
---@param decision table
---@param wanted string?
---@param has_imatrix boolean
---@return string? fit
---@return string? problem
function recipe.fit_of(decision, wanted, has_imatrix)
  local fit = decision.fit or wanted
  if fit == "imatrix" and not has_imatrix then return nil, "fit imatrix needs an imatrix" end
  if fit == "best" then return has_imatrix and "imatrix" or "mse" end
  if fit == "qstream" and decision.mode ~= "mxfp4" then return nil end
  return fit
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

---What recipe keep can do about a matrix that cannot be kept.
---@param mode string?  that it is stored in; nil where that is several
---@return string
function recipe.keep_advice(mode)
  if not mode then return " (recipe keep_bf16 writes all as BF16)" end
  return (" (--set 'undo=[\"%s\"]' writes matrices in %s as BF16)"):format(mode, mode)
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
  if problem then
    return nil, "cannot be kept as it is stored: " .. problem .. recipe.keep_advice(p.mode)
  end
  return { mode = p.mode, bits = p.bits, group = p.group, scales = p.scales, exact = true }
end

-- "(affine, 7 bits, group 64)": what was asked for, as far as it was.
local function asked_text(d)
  local words = { d.mode }
  if d.bits ~= nil then words[#words + 1] = ("%s bits"):format(d.bits) end
  if d.group ~= nil then words[#words + 1] = ("group %s"):format(d.group) end
  return ("(%s)"):format(table.concat(words, ", "))
end

local function unknown_mode(mode)
  local modes = {}
  for name in pairs(FORMATS) do modes[#modes + 1] = name end
  table.sort(modes)
  return ("unknown mode %s; there are: %s"):format(mode, table.concat(modes, " "))
end

-- What makes a decision to encode impossible, or bits and group.
local function checked_format(tensor, d)
  local format = FORMATS[d.mode]
  if not format then return unknown_mode(d.mode) end
  if not tensor.matrix then return "only matrices of the text stack can be quantized" end
  local groups = format.whole_rows and { tensor.cols } or format.groups
  local bits, group = d.bits, d.group or groups[1]
  if bits == nil and #format.bits == 1 then bits = format.bits[1] end
  if bits == nil then return "bits are missing" end
  if not contains(format.bits, bits) then
    return ("%s has no %s-bit form"):format(d.mode, bits)
  end
  if not contains(groups, group) then
    return ("%s has no group of %s"):format(d.mode, group)
  end
  if tensor.cols % group ~= 0 then
    return ("rows of %d do not divide into groups of %d"):format(tensor.cols, group)
  end
  if d.fit ~= nil and not contains(recipe.FITS, d.fit) then
    return ("unknown fit %s; there are: %s"):format(d.fit, table.concat(recipe.FITS, " "))
  end
  if d.fit == "qstream" and d.mode ~= "mxfp4" then
    return ("fit qstream chooses among exponents of mxfp4; %s has none"):format(d.mode)
  end
  return nil, math.tointeger(bits), math.tointeger(group)
end

-- The decision with defaults filled in, or nil and what is wrong with it.
local function checked(tensor, d)
  if type(d) ~= "table" then return nil, "a decision (table) expected, got " .. type(d) end
  for k, v in pairs(d) do
    local kind = DECISION_FIELDS[k]
    if not kind then return nil, ("unknown field '%s' in a decision"):format(tostring(k)) end
    if type(v) ~= kind then return nil, ("%s: %s expected, got %s"):format(k, kind, type(v)) end
  end
  local kinds = (d.mode ~= nil and 1 or 0) + (d.keep ~= nil and 1 or 0) + (d.drop ~= nil and 1 or 0)
  if kinds ~= 1 then return nil, "a decision has exactly one of mode, keep and drop" end
  for _, k in ipairs { "bits", "group", "fit", "gptq" } do
    if d.mode == nil and d[k] ~= nil then return nil, ("%s needs a mode"):format(k) end
  end
  if d.drop ~= nil then
    if not d.drop then return nil, "drop is true or absent" end
    if tensor.part == "text" then return nil, "the text stack cannot do without it" end
    return { drop = true }
  end
  if d.keep == "stored" and tensor.packed then return kept_packed(tensor) end
  if d.keep ~= nil then
    local stored = tensor.stored
    if d.keep == "stored" then
      stored = stored or tensor.matrix and tensor.dtype and tensor.dtype:lower()
    elseif d.keep ~= "bf16" then
      return nil, ("keep = %s: \"bf16\" and \"stored\" are known"):format(d.keep)
    end
    return { keep = stored or "bf16" }
  end
  local problem, bits, group = checked_format(tensor, d)
  if problem then return nil, ("%s: %s"):format(asked_text(d), problem) end
  return { mode = d.mode, bits = bits, group = group, fit = d.fit, gptq = d.gptq }
end

local function words(values)
  local list = {}
  for i, value in ipairs(values) do list[i] = tostring(value) end
  return table.concat(list, " ")
end

-- What a recipe wants of the quantizer unless it is told otherwise, or nil and what is wrong.
local function checked_defaults(d)
  if type(d) ~= "table" then return nil, "a table expected, got " .. type(d) end
  for k, v in pairs(d) do
    local values = ({ fit = recipe.FITS, gptq = { true, false }, awq = recipe.AWQ })[k]
    if not values then return nil, ("unknown field '%s'"):format(tostring(k)) end
    if not contains(values, v) then
      return nil, ("%s = %s; there are: %s"):format(k, tostring(v), words(values))
    end
  end
  return { fit = d.fit, gptq = d.gptq, awq = d.awq }
end

-- ---- running recipes ---------------------------------------------------------------------------

-- Files are code from others. A decision takes a few hundred instructions, patterns over a list of
-- all tensors millions; what never ends is stopped within a tenth of a second.
local LIMITS = { instructions = 10000000, memory = 64 << 20, block = 256 << 10 }

-- true and what f(...) returns, f being a function of the host's; nil, message, code if it raises
-- or takes too many instructions, as functions of a sandbox have it.
local function call_own(f, ...)
  local ok, result = guard.call(f, ...)
  if ok then return true, result end
  if type(result) == "string" then return nil, result:match("^[^\n]*"), "format" end
  return nil, ("(error object is a %s value)"):format(type(result)), "format"
end

-- What recipes are shown of a tensor: copies, so that they change nothing.
local SHOWN = { "name", "output", "part", "class", "rows", "cols", "layer", "n_layers", "kind",
  "matrix", "dtype" }

local function shown(tensor)
  local copy = { shape = table.move(tensor.shape, 1, #tensor.shape, 1, {}) }
  for _, key in ipairs(SHOWN) do copy[key] = tensor[key] end
  if tensor.packed then
    copy.packed = {}
    for key, value in pairs(tensor.packed) do copy.packed[key] = value end
  end
  return copy
end

-- ---- published recipes -------------------------------------------------------------------------

-- A name is a file of its own or one of moonlet's recipes.
local function path_of(name)
  if name:find("%.lua$") or name:find("/", 1, true) then return name end
  local dir = name:find("^[%w_-]+$") and sys.data_dir("recipes")
  return dir and ("%s/%s.lua"):format(dir, name)
end

---The recipes that come with moonlet, sorted by name; the first line of a file says what it does.
---@return { name: string, summary: string, text: string }[]? recipes
---@return string? message
---@return string? code
function recipe.list()
  local dir = sys.data_dir("recipes")
  if not dir then return nil, "the published recipes are not installed", "io" end
  local files, message, code = core.list_dir(dir)
  if not files then return nil, message, code end
  local list = {}
  for file in pairs(files) do
    local text
    local name = file:match("^([%w_-]+)%.lua$")
    if name then
      text, message, code = sys.read_own_file(("%s/%s"):format(dir, file))
      if not text then return nil, message, code end
      list[#list + 1] = { name = name, text = text,
        summary = text:match("^%-%- [%w_-]+: ([^\n]*)") or "" }
    end
  end
  table.sort(list, function(a, b) return a.name < b.name end)
  return list
end

local function no_such(name)
  local names, list = {}, recipe.list() or {}
  for i, r in ipairs(list) do names[i] = r.name end
  return nil, ("no recipe named %s, and no such file; there are: %s"):format(name,
    table.concat(names, " ")), "io"
end

local function read_source(name)
  local path = path_of(name)
  if not (path and sys.exists(path)) then return no_such(name) end
  local text, message, code = sys.read_own_file(path)
  if not text then return nil, "recipe " .. message, code end
  return text, path
end

-- ---- loading -----------------------------------------------------------------------------------

---@class moonlet.Recipe
---@field name string
---@field text string?   of its file
---@field options table
---@field base table?  the decision that its options ask for, before any rule of its own
---@field defaults { fit: string?, gptq: boolean?, awq: string? }  what it wants of the quantizer
---  unless the quantizer's own options say otherwise
local Recipe = {}
Recipe.__index = Recipe

---The checked decision for one tensor.
---@param tensor moonlet.Tensor
---@return table? decision
---@return string? message
---@return string? code
function Recipe:decide(tensor)
  local ok, answer, code = self.decider(shown(tensor))
  if not ok then
    return nil, ("recipe %s: %s: %s"):format(self.name, tensor.name, answer), code
  end
  local decision, problem = checked(tensor, answer)
  if decision then return decision end
  return nil, ("recipe %s: %s [%s]: %s"):format(self.name, tensor.name,
    table.concat(tensor.shape, ", "), problem), "range"
end

---To be called once it has decided on all tensors of a checkpoint: it may find that something was
---not there.
---@return boolean? ok
---@return string? message
---@return string? code
function Recipe:finish()
  local ok, problem = true, nil
  if self.at_end then ok, problem = self.at_end() end
  if ok then return true end
  return nil, ("recipe %s: %s"):format(self.name, problem), "range"
end

local function is_plain(value)
  if type(value) ~= "table" then
    return type(value) == "string" or type(value) == "number" or type(value) == "boolean"
  end
  for k, v in pairs(value) do
    if math.type(k) ~= "integer" or type(v) == "table" or not is_plain(v) then return false end
  end
  return true
end

-- Options can be any; which a recipe has is for it to say.
local function copy_options(given)
  local taken = {}
  if given ~= nil and type(given) ~= "table" then
    options.misuse("option table expected, got " .. type(given))
  end
  for key, value in pairs(given or {}) do
    if type(key) ~= "string" then options.misuse("options of a recipe have names") end
    if not is_plain(value) then
      options.misuse(("option '%s': boolean, number, text or a list of them expected, got %s")
        :format(key, type(value)))
    end
    taken[key] = value
    if type(value) == "table" then -- an empty list stays one when it is written as JSON
      taken[key] = setmetatable(table.move(value, 1, #value, 1, {}), getmetatable(value))
    end
  end
  return taken
end

-- What a chunk returns, which has to be a function, or nil, message, code.
local function loaded(box, text, name)
  -- What Lua leaves out of its own files (lauxlib.c, skipcomment): a mark of UTF-8, a #! line.
  text = text:gsub("^\xEF\xBB\xBF", ""):gsub("^#[^\n]*", "")
  local chunk, message, code = box:load(text, name)
  if not chunk then return nil, message, code end
  local ok, result
  ok, result, code = chunk()
  if not ok then return nil, result, code end
  if sandbox.is_function(result) then return result end
  return nil, "must return function(options, kit), returned " .. type(result), "format"
end

-- The kit, and what runs its checks at the end.
local function kit_of(box)
  local make = assert(loaded(box, sandbox.module_text "moonlet.kit", "kit.lua"))
  local builders = {}
  for _, r in ipairs(recipe.list() or {}) do builders[r.name] = loaded(box, r.text, r.name) end
  return select(2, assert(make(FORMATS, builders)))
end

---What recipes are given, for use outside of sandboxes; without published recipes.
---@return moonlet.Kit
function recipe.kit() return (require "moonlet.kit"(FORMATS, {})) end

-- What a decision by itself has to suit.
local ANY_MATRIX = { part = "text", matrix = true, cols = 128 }

---A decision for matrices whose rows divide into its groups, with its defaults filled in.
---@param decision table
---@return table? decision
---@return string? problem
function recipe.checked(decision) return checked(ANY_MATRIX, decision) end

-- The decider that a chunk makes for these options, its base, defaults and last check, or nil,
-- message, code.
local function built(text, path, given)
  local box, build, message, code
  box, message, code = sandbox.open(LIMITS)
  if not box then return nil, message, code end
  build, message, code = loaded(box, text, path)
  if not build then return nil, message, code end
  local kit, at_end = kit_of(box)
  local ok, decider, base, defaults = build(given, kit)
  if not ok then return nil, decider, base end
  if not sandbox.is_function(decider) then
    return nil, "function(options, kit) must return a function, returned " .. type(decider),
      "format"
  end
  if base ~= nil then
    base, message = recipe.checked(base)
    if not base then return nil, "base decision: " .. message, "format" end
  end
  if defaults ~= nil then
    defaults, message = checked_defaults(defaults)
    if not defaults then return nil, "defaults: " .. message, "format" end
  end
  return { decider = decider, base = base, defaults = defaults or {}, at_end = at_end }
end

---Loads a recipe by name or file and fixes its options. A function(tensor) -> decision is taken
---as a recipe without options.
---@param source string|function|moonlet.Recipe
---@param given table<string, boolean|number|string|table>?  options of the recipe
---@return moonlet.Recipe? recipe
---@return string? message
---@return string? code
function recipe.load(source, given)
  if getmetatable(source) == Recipe then return source end
  given = copy_options(given)
  if type(source) == "function" then
    if next(given) then options.misuse("a recipe given as a function takes no options") end
    local function decider(tensor) return call_own(source, tensor) end
    return setmetatable({ name = "function", options = {}, defaults = {}, decider = decider },
      Recipe)
  end
  if type(source) ~= "string" then
    options.misuse("recipe: name, file or function expected, got " .. type(source))
  end
  local text, path, code = read_source(source)
  if not text then return nil, path, code end
  local self, problem
  self, problem, code = built(text, path, given)
  if not self then return nil, ("recipe %s: %s"):format(source, problem), code end
  self.name, self.text, self.options = source, text, given
  return setmetatable(self, Recipe)
end

---Options of a recipe as larger option tables spell them: bits, group, mode and mxfp beside a table
---recipe_options.
---@param given { bits: integer?, group: integer?, mode: string?, mxfp: boolean?,
---  recipe_options: table? }
---@return table
function recipe.options_of(given)
  local all = copy_options(given.recipe_options)
  for _, key in ipairs { "bits", "group", "mode", "mxfp" } do
    if given[key] ~= nil and all[key] ~= nil then
      options.misuse(("option '%s' is given twice"):format(key))
    end
    if all[key] == nil then all[key] = given[key] end
  end
  return all
end

return recipe
