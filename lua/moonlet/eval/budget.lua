--- The best allocation for a size: what each format does to each matrix of a model, and the bytes
--- shared out so that the sum is least.
---
--- Damage of a matrix under a decision: weight * relative squared error of the format. With an
--- imatrix the error is that of this matrix for inputs as they are (moonlet.damage), without one
--- that of fitted scales on normal weights (kit.error). The weight is the KL divergence per unit of
--- error: with sensitivity "kld" measured here, one class at a time encoded in 4 bits, and with
--- by = "tensor" one tensor at a time; with "error" that of each class on the demo model
--- (kit.damage).
local allocate = require "moonlet.allocate"
local damage = require "moonlet.damage"
local json = require "moonlet.json"
local model = require "moonlet.model"
local names = require "moonlet.gguf_names"
local options = require "moonlet.options"
local plan = require "moonlet.plan"
local recipe = require "moonlet.recipe"
local sensitivity = require "moonlet.eval.sensitivity"
local sequences = require "moonlet.sequences"
local target = require "moonlet.target"

local budget = {}

-- The format under which weights are measured: errors well above what is left unmeasured, well
-- below where divergence is no longer proportional to them.
local PROBE <const> = { mode = "affine", bits = 4, group = 64 }

local KNOWN <const> = { source = "string", target = "string", sensitivity = "string",
  by = "string", mtp = "string", model = "table", weights = "table", imatrix = "string|table",
  threads = "integer" }
for key, kind in pairs(sequences.OPTIONS) do KNOWN[key] = kind end
KNOWN.on_progress = "function"

-- ---- errors ------------------------------------------------------------------------------------

-- The formats of every matrix { decision, error }, error being relative and squared.
local function errors_by_experience(tensors, kit)
  local found = {}
  for _, tensor in ipairs(tensors) do
    found[tensor] = {}
    for k, d in ipairs(kit.candidates(tensor)) do
      found[tensor][k] = { decision = d, error = kit.error(d) }
    end
  end
  return found
end

local function errors_measured(o, inventory, tensors, kit)
  local measure, message, code = damage.open(o.source, o.imatrix, inventory, o.threads)
  if not measure then return nil, message, code end
  local _ <close> = measure
  local found = {}
  for i, tensor in ipairs(tensors) do
    local candidates = kit.candidates(tensor)
    local errors, problem, kind = measure:errors(tensor, candidates)
    if not errors then return nil, problem, kind end
    found[tensor] = {}
    for k, d in ipairs(candidates) do found[tensor][k] = { decision = d, error = errors[k] } end
    if o.on_progress and o.on_progress(i, #tensors, "errors") == false then
      return nil, "stopped", "cancelled"
    end
  end
  return found
end

-- ---- weights -----------------------------------------------------------------------------------

-- Class or module -> divergence with it, and nothing else, in the format PROBE.
local function measure_weights(o)
  local opts = { decisions = { PROBE }, by = o.by or "class", imatrix = o.imatrix,
    fit = o.imatrix and "best" or nil }
  opts.on_progress = o.on_progress and function(done, total)
    return o.on_progress(done, total, "kld")
  end
  for key in pairs(sequences.OPTIONS) do opts[key] = o[key] end
  local result, message, code = sensitivity.sensitivity(o.model, opts)
  if not result then return nil, message, code end
  local divergence = {}
  for _, row in ipairs(result.rows) do divergence[row.name] = math.max(row.mean, 0) end
  return divergence
end

-- The error of a matrix in the format PROBE, or in groups of 32 where its rows ask for that.
local function probe_error(formats)
  local found = 0
  for _, f in ipairs(formats) do
    local d = f.decision
    if d.bits == PROBE.bits and d.group <= PROBE.group then found = f.error end
  end
  return found
end

-- A function that gives a matrix its divergence per unit of error. What a part of the model (a
-- class, or a matrix that was measured by itself) makes the predictions diverge by in the format
-- PROBE is shared out over the errors that its matrices have in it: errors by experience and errors
-- for known inputs are in different units.
local function weigher(measured, tensors, errors, kit)
  local function part_of(tensor)
    local module = names.bare(tensor.name)
    return measured[module] and module or tensor.class
  end
  local divergence, sums = {}, {}
  for _, tensor in ipairs(tensors) do
    local part = part_of(tensor)
    divergence[part] = measured[part] or (divergence[part] or 0) + kit.damage(tensor, PROBE)
    sums[part] = (sums[part] or 0) + probe_error(errors[tensor])
  end
  return function(tensor)
    local part = part_of(tensor)
    return sums[part] > 0 and divergence[part] / sums[part] or 0
  end
end

-- ---- items -------------------------------------------------------------------------------------

local function kept_bytes(tensor, mtp)
  if tensor.class == "mtp" and mtp == "drop" then return 0 end
  return recipe.bytes(tensor, { keep = tensor.stored or "bf16" })
end

local function matrices_of(tensors)
  local list = {}
  for _, tensor in ipairs(tensors) do
    if tensor.matrix then list[#list + 1] = tensor end
  end
  return list
end

-- What there is no choice about: bytes of the text stack and of the rest, and how many weights the
-- text stack has, matrices included.
local function fixed_of(tensors, mtp)
  local fixed = { text = 0, others = 0, weights = 0 }
  for _, tensor in ipairs(tensors) do
    if tensor.part ~= "text" then
      fixed.others = fixed.others + kept_bytes(tensor, mtp)
    else
      fixed.weights = fixed.weights + tensor.rows * tensor.cols
      if not tensor.matrix then fixed.text = fixed.text + kept_bytes(tensor, mtp) end
    end
  end
  return fixed
end

-- The candidates of every matrix.
local function items_of(tensors, weight_of, errors)
  local items = {}
  for i, tensor in ipairs(tensors) do
    local keep = { keep = tensor.stored or "bf16" }
    local weight, candidates = weight_of(tensor), {}
    for k, f in ipairs(errors[tensor]) do
      candidates[k] = { decision = f.decision, bytes = recipe.bytes(tensor, f.decision),
        damage = weight * f.error }
    end
    candidates[#candidates + 1] = { decision = keep, bytes = recipe.bytes(tensor, keep),
      damage = 0.0 }
    items[i] = { tensor = tensor, candidates = candidates }
  end
  return items
end

-- Bytes of a checkpoint and bits per weight of its text stack, by the bytes of its matrices.
local function size_of(bytes, fixed)
  return bytes + fixed.text + fixed.others, (bytes + fixed.text) * 8 / fixed.weights
end

-- The bytes that are left for matrices.
local function room_for(goal, fixed)
  if goal.bytes then return goal.bytes - fixed.text - fixed.others end
  return goal.bits_per_weight * fixed.weights / 8 - fixed.text
end

local function choice_text(item, candidate)
  local d = candidate.decision
  if d.keep then return item.tensor.name .. " keep" end
  return ("%s %s %d %d"):format(item.tensor.name, d.mode, d.bits, d.group)
end

-- ---- public ------------------------------------------------------------------------------------

-- The items to choose for; weights that are measured go into `found`.
local function measured_items(o, inventory, found)
  local kit, tensors = recipe.kit(), matrices_of(inventory.source.tensors)
  local errors, message, code
  if o.imatrix then
    errors, message, code = errors_measured(o, inventory, tensors, kit)
  else
    errors = errors_by_experience(tensors, kit)
  end
  if not errors then return nil, message, code end
  if o.sensitivity == "kld" and not o.weights then
    found.weights, message, code = measure_weights(o)
    if not found.weights then return nil, message, code end
  end
  return items_of(tensors, weigher(found.weights or {}, tensors, errors, kit), errors)
end

-- Sizes and damages that could be had.
local function frontier_of(items, fixed)
  local frontier = json.array {}
  for i, point in ipairs(allocate.frontier(items)) do
    local bytes, bits = size_of(point.bytes, fixed)
    frontier[i] = json.object({ bytes = bytes, bits_per_weight = bits, damage = point.damage },
      { "bytes", "bits_per_weight", "damage" })
  end
  return frontier
end

---Solves the allocation for a size.
---@param given { source: string, target: string, sensitivity: "error"|"kld"|nil,
---  by: "class"|"tensor"|nil, mtp: "keep"|"drop"|nil, imatrix: string|string[]|nil,
---  model: moonlet.Model?, chat: string?, file: string?, dialogues: integer[]?,
---  weights: table?, threads: integer?,
---  on_progress: (fun(done: integer, total: integer, stage: "errors"|"kld"): boolean?)? }
---  source: directory, or config.json without an imatrix; target as target.parse has it; with
---  sensitivity "kld" the model, opened, and what is scored as for perplexity, or the weights of an
---  earlier result; on_progress counts matrices or tokens
---@return { recipe: "budget", options: { choice: string[] }, bytes: integer, damage: number,
---  frontier: { bytes: number, bits_per_weight: number, damage: number }[],
---  weights: table? }? result  options for
---  recipe "budget"; damage: the divergence expected
---@return string? message
---@return string? code
function budget.solve(given)
  local o = options.check(given, KNOWN)
  options.choice(o, "sensitivity", { "error", "kld" })
  local goal, problem = target.parse(o.target or "")
  if not goal then return nil, problem, "range" end
  local inventory, message, code = plan.inventory(o.source)
  if not inventory then return nil, message, code end
  local found = { weights = o.weights }
  local items
  items, message, code = measured_items(o, inventory, found)
  if not items then return nil, message, code end
  local fixed = fixed_of(inventory.source.tensors, o.mtp)
  local choice, bytes, expected = allocate.solve(items, room_for(goal, fixed))
  local total, bits = size_of(bytes, fixed)
  if not choice then
    return nil, ("budget cannot be that small: its least is %s, %.3f bits per weight"):format(
      plan.size_text(total), bits), "range"
  end
  local lines = json.array {}
  for i, item in ipairs(items) do lines[i] = choice_text(item, choice[i]) end
  return { recipe = "budget", options = { choice = lines, mtp = o.mtp }, bytes = total,
    damage = expected, frontier = frontier_of(items, fixed), weights = found.weights }
end

local FOR_SIZE <const> = { recipe = "string", recipe_options = "table" }
for key, kind in pairs(KNOWN) do FOR_SIZE[key] = kind end

-- Solves with a model that is open as long as it takes.
local function solve_with_model(o)
  local opened, message, code = model.open(o.source, { threads = o.threads, precision = "exact" })
  if not opened then return nil, message, code end
  local _ <close> = opened
  o.model = opened
  return budget.solve(o)
end

---Options that bring a recipe to a size: recipe budget by measuring and solving, others that have
---sizes by their level.
---@param given table  what solve takes but for model, weights and mtp; recipe, and the options that
---  it is given besides as recipe_options; threads
---@return table? options  of the recipe
---@return table|string|nil frontier_or_message  the frontier with recipe budget
---@return string? code
function budget.options(given)
  local o = options.check(given, FOR_SIZE)
  local own = {}
  for key, value in pairs(o.recipe_options or {}) do own[key] = value end
  for _, key in ipairs { "level", "choice" } do
    if own[key] ~= nil then
      options.misuse(("option '%s' is what 'target' finds out: give one of them"):format(key))
    end
  end
  if o.recipe ~= "budget" then
    local goal, problem = target.parse(o.target or "")
    if not goal then return nil, problem, "range" end
    return target.level(o.recipe, o.source, goal, own)
  end
  local wanted = {}
  for key, value in pairs(o) do wanted[key] = KNOWN[key] and value or nil end
  wanted.mtp = own.mtp
  local solve = o.sensitivity == "kld" and solve_with_model or budget.solve
  local solved, message, code = solve(wanted)
  if not solved then return nil, message, code end
  own.choice = solved.options.choice
  return own, solved.frontier
end

---The frontier as lines, thinned out.
---@param frontier table
---@param n integer? lines (12)
---@return string
function budget.frontier_text(frontier, n)
  n = math.min(n or 12, #frontier)
  local lines = { ("%12s %15s %16s"):format("size", "bits per weight", "expected KLD") }
  for i = 1, n do
    local point = frontier[1 + (#frontier - 1) * (i - 1) // math.max(n - 1, 1)]
    lines[i + 1] = ("%12s %15.3f %16.3g"):format(plan.size_text(math.tointeger(point.bytes // 1)),
      point.bits_per_weight, point.damage)
  end
  return table.concat(lines, "\n") .. "\n"
end

return budget
