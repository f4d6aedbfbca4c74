-- What every recipe does to a model: size, divergence, perplexity, time; and what moonlet and
-- budget reach at the sizes of the published ones.
--
--   eval "$(./quickstart env)"
--   lua5.4 bench/recipes.lua DIR DIALOGUES.jsonl [threads=2] [out=results.json]
--
-- Dialogues 1 to 150 are measured, 151 to 300 calibrate (imatrix and Hessians), so that what is
-- measured was never seen. Checkpoints are written below a temporary directory and removed. Prints
-- the rows of docs/results.md as they come; `out` gets them as JSON.
local core = require "moonlet.core"
local moonlet = require "moonlet"
local json = moonlet.json

local source, dialogues = arg[1], arg[2]
local options = { threads = 2 }
for i = 3, #arg do
  local key, value = arg[i]:match("^(%w+)=(.*)$")
  if key then options[key] = math.tointeger(tonumber(value)) or value end
end
if not dialogues then
  io.stderr:write("usage: lua5.4 bench/recipes.lua DIR DIALOGUES.jsonl [threads=N] [out=F.json]\n")
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
  { "unsloth_card_mxfp4" }, { "unsloth_fixed" },
  { "unsloth_fixed", mode = "nvfp4", format = "compressed-tensors" },
  { "qwen3_5", bits = 2 }, { "qwen3_5", bits = 4 },
  { "mixed_2_6" }, { "mixed_3_4" }, { "mixed_3_6" }, { "mixed_4_6" },
  { "nvidia" }, { "config_i" }, { "qstream_mxfp4", format = "compressed-tensors" },
  { "uniform", bits = 3 }, { "uniform", bits = 4 }, { "uniform", mode = "mxfp4" },
  { "uniform", mode = "mxfp8" }, { "uniform", mode = "nvfp4" },
}

local function label_of(row)
  local words = { row[1] }
  for _, key in ipairs { "bits", "mode", "era" } do
    if row[key] then words[#words + 1] = ("%s=%s"):format(key, row[key]) end
  end
  if row.mxfp then words[#words + 1] = "mxfp" end
  return table.concat(words, " ")
end

local function open(path)
  return assert(moonlet.open(path, { threads = options.threads, precision = "exact" }))
end

local results = json.array {}

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
  print(("| %s | %d | %.3f | %.5f | %.3g | %.3g | %.2f %% | %.1f |"):format(label, row.bytes,
    row.bits_per_weight, row.perplexity, row.kld, row.p99, 100 * row.top1, seconds))
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

print("| recipe | bytes of the text stack | bits per weight | perplexity | KLD | 99 % | same best "
  .. "token | seconds |\n|---|---|---|---|---|---|---|---|")
local published = {}
for _, row in ipairs(ROWS) do
  local recipe_options = {}
  for key, value in pairs(row) do
    if key ~= 1 and key ~= "format" then recipe_options[key] = value end
  end
  local result = measure(label_of(row), row[1], recipe_options, { format = row.format })
  if result.bits_per_weight < 15 then published[#published + 1] = result end
end

-- Ours at their sizes: same bits per weight of the text stack or less.
local weights
do
  local model <close> = open(source)
  local solved = assert(moonlet.budget.solve { source = source, target = "6bpw", mtp = "drop",
    sensitivity = "kld", model = model, chat = dialogues, dialogues = { 201, 240 } })
  weights = solved.weights
end
local calibrated = { imatrix = imatrix, hessians = hessians }
local worst = { moonlet = 0, budget = 0 }
for _, other in ipairs(published) do
  local size = ("%.6fbpw"):format(other.bits_per_weight)
  local goal = assert(moonlet.target.parse(size))
  local level = moonlet.target.level("moonlet", source, goal, { mtp = "drop" })
  local solved = moonlet.budget.solve { source = source, target = size, mtp = "drop",
    sensitivity = "kld", weights = weights }
  for name, recipe_options in pairs { moonlet = level, budget = solved and solved.options } do
    local ours = measure(("%s at the size of %s"):format(name, other.label), name, recipe_options,
      calibrated)
    worst[name] = math.max(worst[name], ours.kld / other.kld)
  end
end
print(("\nKLD over that of the published recipe of the size, at worst: moonlet %.3f, budget %.3f")
  :format(worst.moonlet, worst.budget))

if options.out then
  assert(require("moonlet.sys").write_file(options.out, json.encode(results, { indent = 2 })))
end
