-- quantize: carries a recipe out and writes the checkpoint.
--
-- The source is never touched. Everything is written into OUT.partial and renamed at the end, so
-- OUT appears complete or not at all; a failure, an interrupt or a callback's "stop" removes what
-- was written. Memory is bounded by the threads' blocks of rows, whatever the size of a tensor.

local core = require "moonlet.core"
local json = require "moonlet.json"
local mlx = require "moonlet.mlx"
local options = require "moonlet.options"
local plan = require "moonlet.plan"
local recipe = require "moonlet.recipe"
local sys = require "moonlet.sys"

local quantize = {}

---@class moonlet.quantize.options
---@field source string       directory with config.json and BF16, F16 or F32 safetensors
---@field out string          directory to create; may exist if it is empty
---@field recipe string|function
---@field bits integer?       options of the recipe
---@field group integer?
---@field mode string?
---@field mxfp boolean?
---@field format "mlx"?
---@field threads integer?    default: all processors
---@field shard_bytes integer?  default 5 GiB
---@field flavour "metal"|"cpu"|nil   whose rounding to follow, see moonlet.quantize_tensor
---@field mx_rule "ceil"|"nearest"|nil
---@field on_progress fun(done: integer, total: integer, tensor: string): boolean?
---  after every tensor, in bytes of the output; returning false stops

local KNOWN = { source = "string", out = "string", recipe = "any", bits = "integer",
  group = "integer", mode = "string", mxfp = "boolean", format = "string", threads = "integer",
  shard_bytes = "integer", flavour = "string", mx_rule = "string", on_progress = "function" }

-- ---- the directory -----------------------------------------------------------------------------

local function parent_and_name(path)
  local parent, name = path:match("^(.*)/([^/]+)$")
  if not parent then return ".", path end
  return parent == "" and "/" or parent, name
end

-- Refuses an OUT that is in use, is the source or lies within it.
local function check_out(source, out)
  local inside, message, code = core.list_dir(out)
  if inside and next(inside) then
    return nil, out .. ": exists and is not empty", "io"
  end
  if not inside and core.real_path(out) then return nil, message, code end
  local parent, name = parent_and_name(out)
  if name == "." or name == ".." then return nil, out .. ": name a new directory", "io" end
  local from, to
  from, message, code = core.real_path(source)
  if not from then return nil, message, code end
  to, message, code = core.real_path(parent)
  if not to then return nil, message, code end
  to = (to == "/" and "" or to) .. "/" .. name
  if (to .. "/"):sub(1, #from + 1) == from .. "/" then
    return nil, ("%s lies in the source %s"):format(out, source), "io"
  end
  return parent
end

local function remove_dir(dir)
  for name in pairs(core.list_dir(dir) or {}) do os.remove(dir .. "/" .. name) end
  os.remove(dir)
end

-- What belongs to a checkpoint besides weights: tokenizer, templates, generation settings,
-- licence, card.
local SIDE_SUFFIXES = { "%.json$", "%.jinja$", "%.txt$", "%.md$", "%.model$", "%.tiktoken$" }
local SIDE_PREFIXES = { "^LICEN[CS]E", "^NOTICE", "^USE_POLICY" }

local function is_side_file(name)
  if name == "config.json" or name:find("%.index%.json$") or name:find("^%.") then return false end
  for _, list in ipairs { SIDE_SUFFIXES, SIDE_PREFIXES } do
    for _, pattern in ipairs(list) do
      if name:find(pattern) then return true end
    end
  end
  return false
end

local function copy_side_files(source, dir)
  local names, message, code = core.list_dir(source)
  if not names then return nil, message, code end
  for name, is_file in pairs(names) do
    if is_file and is_side_file(name) then
      local bytes, ok
      bytes, message, code = sys.read_file(source .. "/" .. name)
      if not bytes then return nil, message, code end
      ok, message, code = core.file_write(dir .. "/" .. name, bytes)
      if not ok then return nil, message, code end
    end
  end
  return true
end

-- ---- weights -----------------------------------------------------------------------------------

-- Writes one file; `step` is called after each tensor and may ask to stop.
local function write_file(o, writer, dir, file, step)
  local entries, first = {}, {}
  for i, item in ipairs(file.items) do
    first[i] = #entries + 1
    table.move(item.entries, 1, #item.entries, #entries + 1, entries)
  end
  local ok, message, code = writer:create(dir .. "/" .. file.name, entries, file.format)
  if not ok then return nil, message, code end
  for i, item in ipairs(file.items) do
    item.put.entry, item.put.flavour, item.put.mx_rule = first[i], o.flavour, o.mx_rule
    ok, message, code = writer:put(item.put)
    if not ok then return nil, message, code end
    ok, message, code = step(item)
    if not ok then return nil, message, code end
  end
  return writer:finish()
end

local function write_weights(o, dir, files)
  local total, done = 0, 0
  for _, file in ipairs(files) do
    for _, item in ipairs(file.items) do total = total + item.bytes end
  end
  local opened, message, code = core.quant_open(o.source, o.threads or 0)
  if not opened then return nil, message, code end
  local writer <close> = opened
  local function step(item)
    done = done + item.bytes
    if o.on_progress and o.on_progress(done, total, item.name) == false then
      return nil, "stopped", "cancelled"
    end
    return true
  end
  for _, file in ipairs(files) do
    local ok
    ok, message, code = write_file(o, writer, dir, file, step)
    if not ok then return nil, message, code end
  end
  return true
end

-- Everything into `dir`; config.json last, as readers start with it.
local function write_checkpoint(o, dir, files, config)
  local ok, message, code = write_weights(o, dir, files)
  if not ok then return nil, message, code end
  ok, message, code = core.file_write(dir .. "/model.safetensors.index.json", mlx.index(files))
  if not ok then return nil, message, code end
  ok, message, code = copy_side_files(o.source, dir)
  if not ok then return nil, message, code end
  ok, message, code = core.file_write(dir .. "/config.json", config)
  if not ok then return nil, message, code end
  return core.sync_dir(dir)
end

-- Fills OUT.partial with write(dir) and gives it its name; removes it unless all went well, also
-- when write raises.
local function atomically(out, parent, write)
  local partial, complete = out .. ".partial", false
  local ok, message, code = core.make_dir(partial)
  if not ok then
    return nil, message .. " (of another run, or of one that was cut off?)", code
  end
  local _ <close> = setmetatable({}, { __close = function()
    if not complete then remove_dir(partial) end
  end })
  ok, message, code = write(partial)
  if not ok then return nil, message, code end
  ok, message = os.rename(partial, out)
  if not ok then return nil, ("%s: %s"):format(out, message), "io" end
  complete = true
  return core.sync_dir(parent)
end

-- Before hours of work; every file also reserves its own space when it is opened.
local function check_space(parent, out, bytes)
  local free, message, code = core.free_bytes(parent)
  if not free then return nil, message, code end
  if free >= bytes then return true end
  return nil, ("%s: needs %s, %s are free"):format(out, plan.size_text(bytes),
    plan.size_text(free)), "io"
end

local function check_choice(o, key, choices)
  for _, choice in ipairs(choices) do
    if o[key] == nil or o[key] == choice then return end
  end
  local expected = table.concat(choices, " or ")
  options.misuse(("option '%s': %s expected, got '%s'"):format(key, expected, o[key]))
end

local function check_format(format)
  if format == nil or format == "mlx" then return true end
  return nil, ("format '%s' is not built; there is mlx"):format(format), "unsupported"
end

---Quantizes a checkpoint.
---@param given moonlet.quantize.options
---@return moonlet.Plan? plan  what was decided and written; `notes` is a list of lines that the
---  user should read
---@return string? message
---@return string? code
function quantize.run(given)
  local o = options.check(given, KNOWN)
  for _, key in ipairs { "source", "out", "recipe" } do
    if o[key] == nil then options.misuse(("option '%s' is missing"):format(key)) end
  end
  check_choice(o, "flavour", { "metal", "cpu" })
  check_choice(o, "mx_rule", { "ceil", "nearest" })
  if (o.threads or 0) < 0 or (o.shard_bytes or 1) < 1 then
    options.misuse("threads and shard_bytes are positive")
  end
  local out = #o.out > 1 and o.out:gsub("/+$", "") or o.out
  local ok, message, code = check_format(o.format)
  if not ok then return nil, message, code end
  local rule, inventory, decisions, decided, config, parent
  rule, message, code = recipe.load(o.recipe,
    { bits = o.bits, group = o.group, mode = o.mode, mxfp = o.mxfp })
  if not rule then return nil, message, code end
  parent, message, code = check_out(o.source, out)
  if not parent then return nil, message, code end
  inventory, message, code = plan.inventory(o.source)
  if not inventory then return nil, message, code end
  decisions, decided, code = plan.decide(rule, inventory.source.tensors)
  if not decisions then return nil, decided, code end
  config, message, code = mlx.config(inventory.config, inventory.numbers, inventory.source.tied,
    decided, rule.base)
  if not config then return nil, ("%s/config.json: %s"):format(o.source, message), code end
  ok, message, code = check_space(parent, out, decisions.total_bytes)
  if not ok then return nil, message, code end
  local model, mtp = mlx.items(decided, inventory.source.zero_centred)
  local files = mlx.files(model, mtp, o.shard_bytes or mlx.SHARD_BYTES)
  ok, message, code = atomically(out, parent, function(dir)
    return write_checkpoint(o, dir, files, config)
  end)
  if not ok then return nil, message, code end
  decisions.notes = json.array {}
  return decisions
end

return setmetatable(quantize, { __call = function(_, ...) return quantize.run(...) end })
