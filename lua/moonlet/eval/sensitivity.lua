--- What quantizing does, a part at a time: the model runs with one class, layer or tensor encoded
-- in memory, and is compared with itself.
local imatrix = require "moonlet.imatrix"
local json = require "moonlet.json"
local label = require "moonlet.eval.label"
local options = require "moonlet.options"
local recipe = require "moonlet.recipe"
local rows = require "moonlet.eval.rows"
local sequences = require "moonlet.sequences"

local sensitivity = {}

-- ---- what is encoded ----------------------------------------------------------------------------

-- A decision given by itself: for every matrix whose rows divide into its groups.
local function rule_of_decision(decision)
  local full, problem = recipe.checked(decision)
  if not full then return nil, problem, "range" end
  local group = full.mode ~= "fp8" and full.group or 1 -- fp8's is the row, whatever its length
  return recipe.load(function(tensor)
    local fits = full.mode and tensor.matrix and tensor.cols % group == 0
    return fits and decision or { keep = "bf16" }
  end)
end

-- Recipes, each of which is applied to one group at a time.
local function rules_of(opts)
  if opts.recipe then
    local rule, message, code = recipe.load(opts.recipe, opts.recipe_options)
    if not rule then return nil, message, code end
    return { rule }
  end
  local list = {}
  for i, decision in ipairs(opts.decisions) do
    local message, code
    list[i], message, code = rule_of_decision(decision)
    if not list[i] then return nil, message, code end
  end
  return list
end

local GROUPINGS <const> = {
  class = function(tensor) return tensor.class end,
  layer = function(tensor) return tensor.layer and ("layer %d"):format(tensor.layer)
    or tensor.class end,
  tensor = function(tensor) return tensor.module end,
}

local function new_group(name, tensor)
  return { name = name, class = tensor.class, layer = tensor.layer, members = {}, texts = {},
    tensors = 0, parameters = 0, bytes = 0, saved = 0 }
end

-- What Model:replace takes but for the importance, which is read when it is needed. Copies in
-- memory are encoded without error feedback, which decisions may ask for.
local function encoding_of(decision, fit)
  return { mode = decision.mode, bits = decision.bits, group = decision.group, fit = fit }
end

local function add_member(group, tensor, decision, fit)
  local bytes, n = recipe.bytes(tensor, decision), tensor.rows * tensor.cols
  local text = recipe.decision_text(decision)
  if fit ~= "minmax" then text = text .. " " .. fit end
  if not group.texts[text] then
    group.texts[text] = true
    group.decision = group.decision and group.decision .. ", " .. text or text
  end
  group.members[#group.members + 1] = { module = tensor.module,
    experts = #tensor.shape == 3 and tensor.shape[1] or nil,
    encoding = encoding_of(decision, fit) }
  group.tensors, group.parameters = group.tensors + 1, group.parameters + n
  group.bytes, group.saved = group.bytes + bytes, group.saved + 2 * n - bytes
end

-- The groups of what a rule encodes, in the order of the model, and one of everything.
local function groups_of(tensors, rule, opts)
  local list, known, all = {}, {}, new_group("all", {})
  for _, tensor in ipairs(tensors) do
    local decision, message, code = rule:decide(tensor)
    if not decision then return nil, message, code end
    if decision.mode then
      local name = GROUPINGS[opts.by or "class"](tensor)
      local fit, problem = recipe.fit_of(decision, opts.fit or rule.defaults.fit,
        opts.imatrix ~= nil)
      if problem then return nil, ("%s: %s"):format(tensor.module, problem), "range" end
      fit = fit or "minmax"
      if not known[name] then
        known[name] = new_group(name, tensor)
        list[#list + 1] = known[name]
      end
      add_member(known[name], tensor, decision, fit)
      add_member(all, tensor, decision, fit)
    end
  end
  return list, all
end

-- ---- measuring ----------------------------------------------------------------------------------

-- The model's final rows of all passes, to be compared with.
local function reference_rows(model, passes, progress)
  local finals = {}
  for i, piece in ipairs(passes) do
    local message, code
    finals[i], message, code = rows.finals(model, piece, progress)
    if not finals[i] then return nil, message, code end
  end
  return finals
end

local function compare_all(model, passes, finals, progress)
  local columns = rows.new()
  for p, piece in ipairs(passes) do
    local mine, message, code = rows.finals(model, piece, progress)
    if not mine then return nil, message, code end
    for i, sequence in ipairs(piece) do
      local targets = rows.targets(sequence)
      local out
      out, message, code = model:compare(mine[i], model, finals[p][i], targets)
      if not out then return nil, rows.explain(message, code, model) end
      rows.add(columns, out)
      progress(#targets)
    end
  end
  return columns
end

-- A group's row of the table.
local function row_of(group, columns, rule)
  local row = rows.summary(columns)
  row.rule = rule
  row.name, row.decision, row.class, row.layer = group.name, group.decision, group.class,
    group.layer
  row.tensors, row.parameters, row.bytes, row.saved = group.tensors, group.parameters,
    group.bytes, group.saved
  row.kld_per_mib = group.saved > 0 and row.mean / (group.saved / 2 ^ 20) or nil
  return row
end

-- Mean squares of a member's inputs, of each expert of a stack; nil if the imatrix has none.
local function importance_of(calibration, member)
  local parts = {}
  for expert = 0, (member.experts or 1) - 1 do
    parts[expert + 1] = calibration:importance(member.module, member.experts and expert)
    if not parts[expert + 1] then return nil end
  end
  return table.concat(parts)
end

local function replace_all(model, group, calibration)
  for _, member in ipairs(group.members) do
    local encoding = member.encoding
    local importance = encoding.fit == "imatrix" and importance_of(calibration, member)
    local ok, message, code = model:replace(member.module, { mode = encoding.mode,
      bits = encoding.bits, group = encoding.group, importance = importance or nil,
      fit = encoding.fit == "imatrix" and not importance and "mse" or encoding.fit })
    if not ok then return nil, message, code end
  end
  return true
end

local function measure(run, group, rule)
  local model = run.model
  local _ <close> = setmetatable({}, { __close = function() model:restore() end })
  local ok, columns, message, code
  ok, message, code = replace_all(model, group, run.calibration)
  if not ok then return nil, message, code end
  columns, message, code = compare_all(model, run.passes, run.finals, run.progress)
  if not columns then return nil, message, code end
  return row_of(group, columns, rule)
end

-- ---- public -------------------------------------------------------------------------------------

local OPTIONS <const> = { decisions = "table", recipe = "any", recipe_options = "table",
  by = "string", fit = "string", imatrix = "string|table", on_progress = "function" }
for key, kind in pairs(sequences.OPTIONS) do OPTIONS[key] = kind end

local function check_options(opts)
  opts = options.check(opts, OPTIONS)
  if (opts.decisions == nil) == (opts.recipe == nil) then
    options.misuse("one of decisions and recipe expected")
  end
  options.choice(opts, "by", { "class", "layer", "tensor" })
  options.choice(opts, "fit", recipe.FITS)
  return opts
end

-- Groups of every rule, and how many passes over the text they take.
local function all_groups(model, opts)
  local rules, message, code = rules_of(opts)
  if not rules then return nil, message, code end
  local tensors
  tensors, message, code = model:tensors()
  if not tensors then return nil, message, code end
  local tables, passes = {}, 1
  for i, rule in ipairs(rules) do
    local list, all, kind = groups_of(tensors, rule, opts)
    if not list then return nil, all, kind end
    if #list == 0 then return nil, "nothing is encoded: every matrix is kept", "range" end
    tables[i] = { list = list, all = all }
    if opts.recipe then tables[i].label = label.recipe(rule.name, rule.options) end
    passes = passes + #list + 1
  end
  return tables, passes
end

-- The rows of all groups of all rules into `result`.
local function measure_tables(run, tables, result)
  for rule, groups in ipairs(tables) do
    groups.list[#groups.list + 1] = groups.all
    for _, group in ipairs(groups.list) do
      local row, message, code = measure(run, group, rule)
      if not row then return nil, message, code end
      local place = group == groups.all and result.totals or result.rows
      place[#place + 1] = row
      if group == groups.all then row.label = groups.label end
      result.tokens = row.tokens
    end
  end
  return result
end

-- The imatrix of the options, something to close without one.
local function open_imatrix(model, path)
  if not path then return setmetatable({}, { __close = function() end }) end
  return imatrix.read(path, model:info().config)
end

---Quantizes a class, layer or tensor at a time, in memory, and measures what that does to the
---model's predictions. Replacements of the model are undone.
---@param model moonlet.Model
---@param opts { decisions?: table[], recipe?: string|function, recipe_options?: table,
---  by?: "class"|"layer"|"tensor", fit?: string, imatrix?: string|string[], file?: string,
---  text?: string, chat?: string, window?: integer, windows?: integer[], dialogues?: integer[],
---  on_progress?: fun(done: integer, total: integer) }
---  decisions { mode, bits, group, fit }, each of which is tried on every group, or a recipe, whose
---  decisions are, without error feedback; by class unless told; fit for decisions that have none:
---  "minmax", "mse", "imatrix", "qstream" or "best", with an imatrix; what is scored as
---  for perplexity
---@return table? result rows and totals (a row per decision or recipe: everything at once), each
---  with rule (number of the decision), name, decision (text), class, layer, tensors, parameters,
---  bytes, saved (bytes, against bf16), kld_per_mib (mean KLD per MiB saved), and what eval.kld
---  measures; reference, tokens, words, by, notes if there are any
---@return string? message, string? code
function sensitivity.sensitivity(model, opts)
  opts = check_options(opts)
  local tables, n, code = all_groups(model, opts)
  if not tables then return nil, n, code end
  local list, words, notes = sequences.read(model, opts)
  if not list then return nil, words, notes end

  local calibration <close>, problem, kind = open_imatrix(model, opts.imatrix)
  if not calibration then return nil, problem, kind end
  model:restore()
  local run = { model = model, calibration = calibration, passes = rows.passes(model, list),
    progress = rows.progress(list, opts.on_progress, n, n - 1) }
  local message
  run.finals, message, code = reference_rows(model, run.passes, run.progress)
  if not run.finals then return nil, message, code end
  return measure_tables(run, tables, { rows = json.array {}, totals = json.array {},
    by = opts.by or "class", reference = model.dir, words = words, notes = notes })
end

return sensitivity
