--- The best allocation for a size: what each format does to each class of a model, measured or by
--- experience, and the bytes shared out so that the sum is least.
---
--- Damage of a tensor under a decision: weight of its class * relative squared error of the
--- format / tensors of the class. The error is that of fitted scales on normal weights (kit.error).
--- The weight is the KL divergence per unit of error: with sensitivity "kld" measured here, one
--- class at a time encoded in 4 bits, and with by = "tensor" one tensor at a time; with "error"
--- those that were measured on the demo model (kit.damage).
local allocate = require "moonlet.allocate"
local json = require "moonlet.json"
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

local CANDIDATES <const> = {}
for _, bits in ipairs { 2, 3, 4, 5, 6, 8 } do
  for _, group in ipairs { 32, 64, 128 } do
    CANDIDATES[#CANDIDATES + 1] = { mode = "affine", bits = bits, group = group }
  end
end

local KNOWN <const> = { source = "string", target = "string", sensitivity = "string",
  by = "string", mtp = "string", model = "table", weights = "table" }
for key, kind in pairs(sequences.OPTIONS) do KNOWN[key] = kind end
KNOWN.on_progress = "function"

-- ---- weights -----------------------------------------------------------------------------------

-- Divergence per unit of error by class or matrix, measured.
local function measure(o, kit)
  local opts = { decisions = { PROBE }, by = o.by or "class", on_progress = o.on_progress }
  for key in pairs(sequences.OPTIONS) do opts[key] = o[key] end
  local result, message, code = sensitivity.sensitivity(o.model, opts)
  if not result then return nil, message, code end
  local unit, of = kit.error(PROBE), {}
  for _, row in ipairs(result.rows) do
    of[row.name] = { weight = math.max(row.mean, 0) / unit, tensors = row.tensors }
  end
  return of
end

-- What the parts of a model are called without its prefix, as moonlet.eval.sensitivity has it.
local function module_of(tensor)
  return (tensor.name:gsub("^model%.", ""):gsub("^language_model%.", ""):gsub("%.weight$", ""))
end

-- ---- items -------------------------------------------------------------------------------------

local function kept_bytes(tensor, mtp)
  if tensor.class == "mtp" and mtp == "drop" then return 0 end
  return recipe.bytes(tensor, { keep = tensor.stored or "bf16" })
end

-- Candidates of every matrix, and the bytes of all that is written besides.
local function items_of(tensors, weight_of, kit, mtp)
  local items, fixed = {}, 0
  for _, tensor in ipairs(tensors) do
    if not tensor.matrix then
      fixed = fixed + kept_bytes(tensor, mtp)
    else
      local keep = { keep = tensor.stored or "bf16" }
      local weight, candidates = weight_of(tensor), {}
      for _, decision in ipairs(CANDIDATES) do
        if tensor.cols % decision.group == 0 then
          candidates[#candidates + 1] = { decision = decision,
            bytes = recipe.bytes(tensor, decision),
            damage = weight and weight * kit.error(decision) or kit.damage(tensor, decision) }
        end
      end
      candidates[#candidates + 1] = { decision = keep, bytes = recipe.bytes(tensor, keep),
        damage = 0 }
      items[#items + 1] = { tensor = tensor, candidates = candidates }
    end
  end
  return items, fixed
end

-- The target as bytes of everything that is written.
local function budget_bytes(goal, tensors, mtp)
  if goal.bytes then return goal.bytes end
  local weights, others = 0, 0
  for _, tensor in ipairs(tensors) do
    if tensor.part == "text" then
      weights = weights + tensor.rows * tensor.cols
    else
      others = others + kept_bytes(tensor, mtp)
    end
  end
  return goal.bits_per_weight * weights / 8 + others
end

local function choice_text(item, candidate)
  local d = candidate.decision
  if d.keep then return item.tensor.name .. " keep" end
  return ("%s %s %d %d"):format(item.tensor.name, d.mode, d.bits, d.group)
end

-- ---- public ------------------------------------------------------------------------------------

---Solves the allocation for a size.
---@param given { source: string, target: string, sensitivity: "error"|"kld"|nil,
---  by: "class"|"tensor"|nil, mtp: "keep"|"drop"|nil, model: moonlet.Model?,
---  chat: string?, file: string?, dialogues: integer[]?,
---  weights: table?, on_progress: fun(done: integer, total: integer)? }
---  source: directory or config.json; target as target.parse has it; with sensitivity "kld" the
---  model, opened, and what is scored as for perplexity, or the weights of an earlier result
---@return { recipe: "budget", options: { choice: string[] }, bytes: integer, damage: number,
---  frontier: { bytes: number, bits_per_weight: number, damage: number }[],
---  weights: table? }? result  options for
---  recipe "budget"; damage: the divergence expected
---@return string? message
---@return string? code
function budget.solve(given)
  local o = options.check(given, KNOWN)
  local goal, problem = target.parse(o.target or "")
  if not goal then return nil, problem, "range" end
  local inventory, message, code = plan.inventory(o.source)
  if not inventory then return nil, message, code end
  local tensors, kit = inventory.source.tensors, recipe.kit()
  local weights = o.weights
  if o.sensitivity == "kld" and not weights then
    weights, message, code = measure(o, kit)
    if not weights then return nil, message, code end
  elseif o.sensitivity ~= nil and o.sensitivity ~= "error"
    and o.sensitivity ~= "kld" then
    options.misuse("option 'sensitivity': error or kld expected, got " .. o.sensitivity)
  end

  local function weight_of(tensor)
    local found = weights and (weights[tensor.class] or weights[module_of(tensor)])
    return found and found.weight / found.tensors
  end
  local items, fixed = items_of(tensors, weight_of, kit, o.mtp)
  local room = budget_bytes(goal, tensors, o.mtp) - fixed
  local choice, bytes, damage = allocate.solve(items, room)
  if not choice then
    return nil, ("budget cannot be that small: its least is %s"):format(
      plan.size_text(bytes + fixed)), "range"
  end
  local lines, n_weights = json.array {}, 0
  for i, item in ipairs(items) do
    lines[i] = choice_text(item, choice[i])
    n_weights = n_weights + item.tensor.rows * item.tensor.cols
  end
  local frontier = json.array {}
  for i, point in ipairs(allocate.frontier(items)) do
    frontier[i] = json.object({ bytes = point.bytes + fixed,
      bits_per_weight = point.bytes * 8 / n_weights, damage = math.max(point.damage, 0.0) },
      { "bytes", "bits_per_weight", "damage" })
  end
  return { recipe = "budget", options = { choice = lines, mtp = o.mtp }, bytes = bytes + fixed,
    damage = damage, frontier = frontier, weights = weights }
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
