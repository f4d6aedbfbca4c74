-- quantize: carries a recipe out and writes the checkpoint.
--
-- The source is never touched. Everything is written into OUT.partial and renamed at the end, so
-- OUT appears complete or not at all; a failure removes what was written, an interrupt or a
-- callback's "stop" leaves it to be resumed. Memory is bounded by the threads' blocks of rows,
-- whatever the size of a tensor.

local job = require "moonlet.quantize.job"
local options = require "moonlet.options"
local partial = require "moonlet.partial"
local provenance = require "moonlet.provenance"
local run = require "moonlet.quantize.run"
local shards = require "moonlet.shards"

local quantize = {}

---@class moonlet.quantize.options
---@field source string       directory with config.json and safetensors
---@field out string          directory to create; may exist if it is empty
---@field recipe string|function
---@field bits integer?       options of the recipe
---@field group integer?
---@field mode string?
---@field mxfp boolean?
---@field recipe_options table?  further options of the recipe
---@field format "mlx"|"compressed-tensors"|"bf16"|nil  default mlx
---@field imatrix string|string[]|nil  what the inputs look like, see moonlet.imatrix
---@field fit "minmax"|"mse"|"imatrix"|"qstream"|"best"|nil  how scales are chosen where a decision
---  does not say; default minmax, and mse with error feedback
---@field awq "search"|"mlx-node"|"off"|nil  scales to fold in, see moonlet.awq; needs an imatrix
---@field hessians string?    file of `moonlet imatrix --hessians`: encode with error feedback
---@field gptq boolean?       whether to, where a decision does not say; default: with `hessians`
---@field threads integer?    default: all processors
---@field shard_bytes integer?  default 5 GiB
---@field flavour "metal"|"cpu"|nil   whose rounding to follow, see moonlet.quantize_tensor
---@field mx_rule "ceil"|"nearest"|nil
---@field resume boolean?     go on where a run that was cut off had stopped
---@field dry_run boolean?    check everything and estimate the time, write nothing
---@field command string?     recorded in moonlet.json
---@field on_progress fun(done: integer, total: integer, tensor: string): boolean?
---  before the first and after every tensor, in bytes of the weights as BF16; before that, while
---  scales are looked for, in groups of matrices and with "awq" as a fourth argument; returning
---  false stops

local KNOWN = { source = "string", out = "string", recipe = "any", bits = "integer",
  group = "integer", mode = "string", mxfp = "boolean", recipe_options = "table",
  format = "string", threads = "integer", fit = "string", imatrix = "any",
  awq = "string", hessians = "string", gptq = "boolean", shard_bytes = "integer",
  flavour = "string", mx_rule = "string", resume = "boolean", dry_run = "boolean",
  command = "string", on_progress = "function" }

local DEFAULTS = { format = "mlx", shard_bytes = shards.LIMIT, flavour = "metal",
  mx_rule = "ceil" }

local function check_choice(o, key, choices)
  for _, choice in ipairs(choices) do
    if o[key] == nil or o[key] == choice then return end
  end
  local expected = table.concat(choices, " or ")
  options.misuse(("option '%s': %s expected, got '%s'"):format(key, expected, o[key]))
end

local function checked(given)
  local o = setmetatable(options.check(given, KNOWN), { __index = DEFAULTS })
  for _, key in ipairs { "source", "out", "recipe" } do
    if o[key] == nil then options.misuse(("option '%s' is missing"):format(key)) end
  end
  check_choice(o, "format", { "mlx", "compressed-tensors", "bf16" })
  check_choice(o, "flavour", { "metal", "cpu" })
  check_choice(o, "mx_rule", { "ceil", "nearest" })
  check_choice(o, "fit", { "minmax", "mse", "imatrix", "qstream", "best" })
  check_choice(o, "awq", { "search", "mlx-node", "off" })
  if o.imatrix ~= nil and type(o.imatrix) ~= "string" and type(o.imatrix) ~= "table" then
    options.misuse("option 'imatrix': path or list of paths expected, got " .. type(o.imatrix))
  end
  if (o.awq or "off") ~= "off" and not o.imatrix then
    options.misuse(("option 'awq': %s needs an imatrix"):format(o.awq))
  end
  if o.fit == "imatrix" and not o.imatrix then
    options.misuse("option 'fit': imatrix needs an imatrix")
  end
  if o.gptq and not o.hessians then options.misuse("option 'gptq' needs 'hessians'") end
  if (o.threads or 0) < 0 or o.shard_bytes < 1 then
    options.misuse("threads and shard_bytes are positive")
  end
  return o
end

-- Everything into the directory; config.json behind what it describes, as readers start with it.
---@param todo moonlet.quantize.Job
---@param dir moonlet.Partial
local function write_checkpoint(todo, dir)
  local ok, message, code = todo:fold(dir)
  if not ok then return nil, message, code end
  local work
  work, message, code = run.open(todo, dir)
  if not work then return nil, message, code end
  local _ <close> = work
  ok, message, code = work:write()
  if not ok then return nil, message, code end
  ok, message, code = dir:write("model.safetensors.index.json", todo:index())
  if not ok then return nil, message, code end
  ok, message, code = dir:copy(todo.options.source, todo.side)
  if not ok then return nil, message, code end
  ok, message, code = dir:write("moonlet.json", todo:provenance(dir.head))
  if not ok then return nil, message, code end
  ok, message, code = dir:write("config.json", todo.config)
  if not ok then return nil, message, code end
  return dir:finish()
end

local function write(todo)
  local dir, message, code = partial.begin(todo.place, todo.found,
    { plan = todo.plan, date = provenance.date(), command = todo.options.command })
  if not dir then return nil, message, code end
  local settled = false
  local _ <close> = setmetatable({}, { __close = function()
    if not settled then dir:leave() end
  end })
  local ok
  ok, message, code = write_checkpoint(todo, dir)
  settled = true
  if ok then return todo.decisions end
  if code ~= "cancelled" then
    dir:remove()
  elseif dir:leave() then
    message = ("%s; %s holds what is done, to be resumed (--resume)"):format(message, dir.dir)
  end
  return nil, message, code
end

-- The plan with what a run would take, in the field dry_run.
local function rehearse(todo)
  local work, message, code = run.open(todo, todo.found)
  local seconds
  if work then
    local _ <close> = work
    seconds, message, code = work:estimate()
  end
  if todo.found then todo.found:close() end
  if not seconds then return nil, message, code end
  if todo:folds() then todo:note "the search for scales (awq) is not in the estimate" end
  todo.decisions.dry_run = { seconds = seconds, files = #todo.files,
    needed_bytes = todo.needed, free_bytes = todo.free }
  return todo.decisions
end

---Quantizes a checkpoint.
---@param given moonlet.quantize.options
---@return moonlet.Plan? plan  what was decided and written; `notes` is a list of lines that the
---  user should read; `dry_run` has what a run would take, when only that was asked for
---@return string? message
---@return string? code
function quantize.run(given)
  local todo, message, code = job.new(checked(given))
  if not todo then return nil, message, code end
  local _ <close> = todo
  if todo.options.dry_run then return rehearse(todo) end
  return write(todo)
end

return setmetatable(quantize, { __call = function(_, ...) return quantize.run(...) end })
