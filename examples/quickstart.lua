-- The main job in one page: plan, quantize, measure, talk. ./quickstart runs it.
local moonlet = require "moonlet"

local SOURCE <const> = "examples/demo-model"
local RECIPE <const> = { bits = 4, mxfp = true }

local function size_of(plan) return ("%.1f MB"):format(plan.total_bytes / 1e6) end

local function perplexity(dir)
  local model <close> = assert(moonlet.open(dir, { precision = "exact" }))
  local result = assert(moonlet.eval.perplexity(model, { chat = SOURCE .. "/eval.jsonl" }))
  return result.perplexity, result.tokens
end

print("1. The plan: what the recipe decides, before any weight is read")
local plan = assert(moonlet.plan("unsloth", SOURCE, RECIPE))
io.write(plan:text())

print("\n2. Quantize")
local out = os.tmpname()
os.remove(out)
local done = assert(moonlet.quantize { source = SOURCE, out = out, recipe = "unsloth",
  bits = RECIPE.bits, mxfp = RECIPE.mxfp })
local before, tokens = perplexity(SOURCE)
local after = perplexity(out)
print(("   size        %s -> %s"):format(size_of(assert(moonlet.plan("keep_bf16", SOURCE))),
  size_of(done)))
print(("   perplexity  %.4f -> %.4f  (%d tokens of eval.jsonl)"):format(before, after, tokens))

print("\n3. Two chat turns and a tool call, from the quantized files")
local model <close> = assert(moonlet.open(out))
local session <close> = assert(model:session {})
local messages = {}

local function ask(text, options)
  messages[#messages + 1] = { role = "user", content = text }
  print("   user:      " .. text)
  assert(session:sync(model:encode(model:render(messages, options))))
  local answer = ""
  for tok in session:generate { temperature = 0, max_tokens = 120 } do
    answer = answer .. tok.text
  end
  print("   assistant: " .. answer:gsub("\n", "\n              "))
  messages[#messages + 1] = { role = "assistant", content = answer }
end

ask("What is the capital of France?")
ask("And of Italy?")
messages = {}
ask("Use the calculator: 540 * 737", { tools = { { type = "function", ["function"] = {
  name = "calculator", description = "Evaluates an arithmetic expression.",
  parameters = { type = "object", properties = { expression = { type = "string" } },
    required = { "expression" } } } } } })

os.execute("rm -r '" .. out .. "'")
