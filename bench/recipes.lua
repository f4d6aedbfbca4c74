-- What every recipe does to a model: size, divergence, perplexity, time; what calibration adds; and
-- what moonlet and budget reach at the sizes of the published ones.
--
--   eval "$(./quickstart env)"
--   lua5.4 bench/recipes.lua DIR DIALOGUES.jsonl [part=all] [threads=2] [out=results.json]
--
-- part is published, calibrated, ours or all. Dialogues 1 to 150 are measured, 151 to 300 calibrate
-- (imatrix and Hessians), so that what is measured was never seen. Checkpoints are written below a
-- temporary directory and removed. Prints the rows of docs/results.md as they come; `out` gets them
-- as JSON.
local core = require "moonlet.core"
local moonlet = require "moonlet"
local json = moonlet.json

local source, dialogues = arg[1], arg[2]
local options = { threads = 2, part = "all" }
for i = 3, #arg do
  local key, value = arg[i]:match("^(%w+)=(.*)$")
  if key then options[key] = math.tointeger(tonumber(value)) or value end
end
if not dialogues then
  io.stderr:write("usage: lua5.4 bench/recipes.lua DIR DIALOGUES.jsonl [part=P] [threads=N] "
    .. "[out=F.json]\n")
  os.exit(2)
end

local MEASURED <const>, CALIBRATING <const> = { 1, 150 }, { 151, 300 }

local dir = os.tmpname()
os.remove(dir)
assert(core.make_dir(dir))
local _ <close> = setmetatable({}, { __close = function() os.execute("rm -rf " .. dir) end })
local imatrix, hessians, logits = dir .. "/i.gguf", dir .. "/h.safetensors", dir .. "/logits"

-- Published recipes, with the options that their cards and converters name.
local ROWS <const> = {
  { "keep_bf16" },
  { "unsloth", bits = 2 }, { "unsloth", bits = 3 }, { "unsloth", bits = 4 },
  { "unsloth", bits = 5 }, { "unsloth", bits = 6 }, { "unsloth", bits = 8 },
  { "unsloth", bits = 4, mxfp = true }, { "unsloth", bits = 8, mxfp = true },
  { "unsloth", mode = "nvfp4" }, { "unsloth", bits = 4, era = "2026-06" },
  { "unsloth", bits = 4, mxfp = true, era = "2026-07" },
  { "unsloth_card_mxfp4" }, { "unsloth_fixed" },
  { "unsloth_fixed", mode = "nvfp4", format = "compressed-tensors" },
  { "qwen3_5", bits = 2 }, { "qwen3_5", bits = 3 }, { "qwen3_5", bits = 4 },
  { "qwen3_5", bits = 8 },
  { "mixed_2_6" }, { "mixed_3_4" }, { "mixed_3_6" }, { "mixed_3_6", rule = "mlx-lm" },
  { "mixed_4_6" },
  { "nvidia" }, { "config_i" }, { "qstream_mxfp4", format = "compressed-tensors" },
  { "uniform", bits = 2 }, { "uniform", bits = 3 }, { "uniform", bits = 4 },
  { "uniform", bits = 4, group = 32 }, { "uniform", bits = 8 },
  { "uniform", bits = 4, like = "mlx-node" }, { "uniform", mode = "mxfp4" },
  { "uniform", mode = "mxfp8" }, { "uniform", mode = "nvfp4" },
}

-- Some of them again with scales that were looked for, and with calibration.
local AGAIN <const> = { { "uniform", bits = 3 }, { "uniform", bits = 4 },
  { "uniform", mode = "mxfp4" }, { "unsloth", bits = 3 }, { "unsloth", bits = 4 },
  { "config_i" } }
local CALIBRATED <const> = {
  { "--fit mse", fit = "mse" },
  { "--fit imatrix", fit = "imatrix", imatrix = imatrix },
  { "--awq mlx-node", awq = "mlx-node", imatrix = imatrix },
  { "--awq search", awq = "search", imatrix = imatrix },
  { "--fit imatrix --awq search", fit = "imatrix", awq = "search", imatrix = imatrix },
  { "--hessians", hessians = hessians },
  { "--fit imatrix --hessians", fit = "imatrix", imatrix = imatrix, hessians = hessians },
}

-- The options of `moonlet quantize`.
local function label_of(row)
  local words = { row[1] }
  for _, key in ipairs { "bits", "group", "mode" } do
    if row[key] then words[#words + 1] = ("--%s %s"):format(key, row[key]) end
  end
  if row.mxfp then words[#words + 1] = "--mxfp" end
  for _, key in ipairs { "era", "rule", "like" } do
    if row[key] then words[#words + 1] = ("--set %s=%s"):format(key, row[key]) end
  end
  if row.format then words[#words + 1] = "--format " .. row.format end
  return table.concat(words, " ")
end

local function options_of(row)
  local given = {}
  for key, value in pairs(row) do
    if key ~= 1 and key ~= "format" then given[key] = value end
  end
  return given
end

local function part(name) return options.part == "all" or options.part == name end

local function open(path)
  return assert(moonlet.open(path, { threads = options.threads, precision = "exact" }))
end

local results = json.array {}

local function with_commas(n)
  return (("%d"):format(n):reverse():gsub("(%d%d%d)", "%1,"):reverse():gsub("^,", ""))
end

local function measure(label, recipe, recipe_options, more)
  local out, start = dir .. "/q", core.seconds()
  os.execute("rm -rf " .. out)
  local job = { source = source, out = out, recipe = recipe, recipe_options = recipe_options,
    threads = options.threads }
  for key, value in pairs(more or {}) do job[key] = value end
  local plan = assert(moonlet.quantize(job))
  local seconds = core.seconds() - start
  local model <close> = open(out)
  local kld = assert(moonlet.eval.kld(model, { reference_logits = logits }))
  local row = json.object({ label = label, bytes = plan.part_bytes.text,
    bits_per_weight = plan.bits_per_weight, perplexity = kld.perplexity, kld = kld.mean,
    p99 = kld.p99, top1 = kld.top1, seconds = seconds }, { "label", "bytes", "bits_per_weight",
    "perplexity", "kld", "p99", "top1", "seconds" })
  results[#results + 1] = row
  print(("| `%s` | %s | %.3f | %.4f | %.3g | %.3g | %.2f %% | %.1f |"):format(label,
    with_commas(row.bytes), row.bits_per_weight, row.perplexity, row.kld, row.p99, 100 * row.top1,
    seconds))
  io.stdout:flush()
  return row
end

assert(moonlet.imatrix { model = source, chat = dialogues, dialogues = CALIBRATING, out = imatrix,
  hessians = hessians, threads = options.threads })
do
  local model <close> = open(source)
  assert(moonlet.eval.save_logits(model, { out = logits, chat = dialogues,
    dialogues = MEASURED }))
end

-- The published recipes that quantize, for comparison.
local function measure_published()
  local published = {}
  for _, row in ipairs(ROWS) do
    local result = measure("--recipe " .. label_of(row), row[1], options_of(row),
      { format = row.format })
    if result.bits_per_weight < 15 then
      published[#published + 1] = { row = row, result = result }
    end
  end
  return published
end

local function measure_calibrated()
  for _, row in ipairs(AGAIN) do
    for _, more in ipairs(CALIBRATED) do
      local job = {}
      for key, value in pairs(more) do
        if key ~= 1 then job[key] = value end
      end
      measure(label_of(row) .. " " .. more[1], row[1], options_of(row), job)
    end
  end
end

-- Ours at their sizes: same bits per weight of the text stack or less.
local function measure_ours(published)
  local weights
  do
    local model <close> = open(source)
    local solved = assert(moonlet.budget.solve { source = source, target = "6bpw", mtp = "drop",
      sensitivity = "kld", model = model, chat = dialogues, dialogues = { 201, 240 } })
    weights = solved.weights
  end
  local calibration <const> = { imatrix = imatrix, hessians = hessians }
  local rows, worst = {}, { calibrated = 0, moonlet = 0, budget = 0 }
  for _, entry in ipairs(published) do
    local row, other = entry.row, entry.result
    local size = ("%.6fbpw"):format(other.bits_per_weight)
    local goal = assert(moonlet.target.parse(size))
    local solved = assert(moonlet.budget.solve { source = source, target = size, mtp = "drop",
      sensitivity = "kld", weights = weights })
    local of = {
      calibrated = measure(other.label .. " --fit imatrix --hessians", row[1], options_of(row),
        { fit = "imatrix", imatrix = imatrix, hessians = hessians, format = row.format }),
      moonlet = measure("moonlet at the size of " .. other.label, "moonlet",
        assert(moonlet.target.level("moonlet", source, goal, { mtp = "drop" })), calibration),
      budget = measure("budget at the size of " .. other.label, "budget", solved.options,
        calibration),
    }
    for name, it in pairs(of) do worst[name] = math.max(worst[name], it.kld / other.kld) end
    rows[#rows + 1] = ("| `%s` | %.3f | %.3g | %.3g | %.3f | %.3g | %.2f | %.3f | %.3g | %.2f |")
      :format(other.label, other.bits_per_weight, other.kld, of.calibrated.kld,
        of.moonlet.bits_per_weight, of.moonlet.kld, of.moonlet.kld / other.kld,
        of.budget.bits_per_weight, of.budget.kld, of.budget.kld / other.kld)
  end
  print("\n| OPTIONS | bits per weight | KLD | calibrated | moonlet: bits per weight | KLD | ratio "
    .. "| budget: bits per weight | KLD | ratio |\n|---|---|---|---|---|---|---|---|---|---|")
  print(table.concat(rows, "\n"))
  print(("\nKLD over that of the published recipe, at worst: calibrated %.3f, moonlet %.3f, "
    .. "budget %.3f"):format(worst.calibrated, worst.moonlet, worst.budget))
end

print("| OPTIONS | bytes of the text stack | bits per weight | perplexity | KLD | 99 % | same best "
  .. "token | seconds |\n|---|---|---|---|---|---|---|---|")
local published = (part "published" or part "ours") and measure_published()
if part "calibrated" then measure_calibrated() end
if part "ours" then measure_ours(published) end

if options.out then
  assert(require("moonlet.sys").write_file(options.out, json.encode(results, { indent = 2 })))
end
