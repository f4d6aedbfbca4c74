-- quantize: carries a recipe out and writes the checkpoint.
--
-- The source is never touched. Everything is written into OUT.partial and renamed at the end, so
-- OUT appears complete or not at all. What stopped by itself or by the machine's fault can be
-- resumed; a failure that would recur removes what was written. Memory is bounded by the threads'
-- blocks of rows, whatever the size of a tensor.

local budget = require "moonlet.eval.budget"
local job = require "moonlet.quantize.job"
local options = require "moonlet.options"
local partial = require "moonlet.partial"
local provenance = require "moonlet.provenance"
local recipe = require "moonlet.recipe"
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
---@field target string?      size to keep to, see moonlet.target; with recipes that have sizes
---@field sensitivity "error"|"kld"|nil  what recipe budget goes by, see moonlet.eval.budget; with
---  "kld" one of `chat` and `file`, perhaps `dialogues`, and `by`
---@field by "class"|"tensor"|nil
---@field chat string?
---@field file string?
---@field dialogues integer[]?
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
---  scales are looked for, in groups of matrices and with "awq" as a fourth argument, and while
---  recipe budget measures, in matrices with "errors" or in tokens with "kld"; returning false
---  stops, but not the measuring of "kld"

-- What says how recipe budget measures.
local MEASURING = { "sensitivity", "by", "chat", "file", "dialogues" }

local KNOWN = { source = "string", out = "string", recipe = "string|function",
  bits = "integer", group = "integer", mode = "string", mxfp = "boolean",
  recipe_options = "table", target = "string", sensitivity = "string", by = "string",
  chat = "string", file = "string", dialogues = "table", format = "string", threads = "integer",
  fit = "string", imatrix = "string|table", awq = "string", hessians = "string",
  gptq = "boolean", shard_bytes = "integer", flavour = "string", mx_rule = "string",
  resume = "boolean", dry_run = "boolean", command = "string", on_progress = "function" }

local DEFAULTS = { format = "mlx", shard_bytes = shards.LIMIT, flavour = "metal",
  mx_rule = "ceil" }

-- Codes of failures that the same run need not meet again: the user's wish, a disk that is full or
-- was gone, memory that others had.
local PASSING = { cancelled = true, io = true, memory = true }

local function check_target(o)
  options.choice(o, "sensitivity", { "error", "kld" })
  if not o.target then
    for _, key in ipairs(MEASURING) do
      if o[key] ~= nil then options.misuse(("option '%s' goes with 'target'"):format(key)) end
    end
  elseif type(o.recipe) ~= "string" then
    options.misuse("option 'target': a function as a recipe has no sizes")
  end
  local measured = o.sensitivity == "kld"
  if measured and o.recipe ~= "budget" then
    options.misuse("option 'sensitivity': kld goes with recipe budget")
  end
  local texts = (o.chat and 1 or 0) + (o.file and 1 or 0)
  if texts ~= (measured and 1 or 0) or not measured and (o.by or o.dialogues) then
    options.misuse("option 'sensitivity': kld goes with one of chat and file; they, by and "
      .. "dialogues with nothing else")
  end
end

local function check_calibration(o)
  if (o.awq or "off") ~= "off" and not o.imatrix then
    options.misuse(("option 'awq': %s needs an imatrix"):format(o.awq))
  end
  if o.fit == "imatrix" and not o.imatrix then
    options.misuse("option 'fit': imatrix needs an imatrix")
  end
  if o.gptq and not o.hessians then options.misuse("option 'gptq' needs 'hessians'") end
end

-- A copy of the options, with defaults.
local function checked(given)
  local o = {}
  for key, value in pairs(DEFAULTS) do o[key] = value end
  for key, value in pairs(options.check(given, KNOWN)) do o[key] = value end
  for _, key in ipairs { "source", "out", "recipe" } do
    if o[key] == nil then options.misuse(("option '%s' is missing"):format(key)) end
  end
  options.choice(o, "format", { "mlx", "compressed-tensors", "bf16" })
  options.choice(o, "flavour", { "metal", "cpu" })
  options.choice(o, "mx_rule", { "ceil", "nearest" })
  options.choice(o, "fit", recipe.FITS)
  options.choice(o, "awq", recipe.AWQ)
  check_calibration(o)
  check_target(o)
  if (o.threads or 0) < 0 or o.shard_bytes < 1 then
    options.misuse("threads and shard_bytes are positive")
  end
  return o
end

-- Gives the recipe the options that bring it to the target; true and, with recipe budget, the
-- frontier. Measuring takes hours: a place that cannot be OUT is refused before.
local function bring_to_size(o)
  if not o.target then return true end
  local place, message, fault = partial.place(o.source, o.out, function() end)
  if not place then return nil, message, fault end
  local given = { source = o.source, recipe = o.recipe, target = o.target, imatrix = o.imatrix,
    threads = o.threads, recipe_options = recipe.options_of(o) }
  for _, key in ipairs(MEASURING) do given[key] = o[key] end
  given.on_progress = o.on_progress and function(done, total, stage)
    return o.on_progress(done, total, "", stage)
  end
  local own, frontier, code = budget.options(given)
  if not own then return nil, frontier, code end
  o.recipe_options, o.bits, o.group, o.mode, o.mxfp = own, nil, nil, nil, nil
  return true, frontier
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
  ok, message, code = dir:write(shards.INDEX, todo:index())
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
  if not PASSING[code] then
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
---  user should read; `dry_run` has what a run would take, when only that was asked for;
---  `frontier` what other sizes would cost, when recipe budget was brought to a size
---@return string? message
---@return string? code
function quantize.run(given)
  local o = checked(given)
  local ok, frontier, code = bring_to_size(o)
  if not ok then return nil, frontier, code end
  local todo, message
  todo, message, code = job.new(o)
  if not todo then return nil, message, code end
  local _ <close> = todo
  local result
  result, message, code = (o.dry_run and rehearse or write)(todo)
  if not result then return nil, message, code end
  result.frontier = frontier
  return result
end

return setmetatable(quantize, { __call = function(_, ...) return quantize.run(...) end })
