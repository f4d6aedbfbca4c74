-- What a decode step costs beside the forward pass, in milliseconds of processor time:
--   lua5.4 bench/step.lua [policies | texts DIR] [draws]
-- "policies" (the default): sampling from 248,320 logits, of which each draw meets another row.
-- "texts": a whole step of a generation over a model that computes nothing, with DIR's tokenizer.

package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
package.cpath = "./build/?.so;" .. package.cpath
local core = require "moonlet.core"
local generate = require "moonlet.generate"
local sampler = require "moonlet.sampler"

local VOCABULARY <const>, ROWS <const> = 248320, 16
local what = arg[1] or "policies"
local draws = math.tointeger(tonumber(arg[what == "texts" and 3 or 2] or 60))
if not (draws and draws >= 1 and (what == "policies" or what == "texts" and arg[2])) then
  io.stderr:write("usage: lua5.4 bench/step.lua [policies | texts DIR] [draws]\n")
  os.exit(2)
end

-- ---- logits ---------------------------------------------------------------------------------

local rng = core.rng(1)

local function normal()
  return math.sqrt(-2 * math.log(1 - rng:uniform())) * math.cos(2 * math.pi * rng:uniform())
end

-- What a model is sure of, what it is not, and what no model says: all tokens about as likely.
local KINDS <const> = {
  { name = "peaked", spread = 2.2, head = { 21, 19.8, 18, 17.5, 16, 15, 14.5, 14, 13, 12 } },
  { name = "open", spread = 2.2, head = { 11, 11, 10.8, 10.5, 10.2, 10 } },
  { name = "flat", spread = 0.1, head = {} },
}

-- Rows that hold the same numbers at other ids.
local function rows_of(kind)
  local values = {}
  for i = 1, VOCABULARY do values[i] = string.pack("<f", kind.spread * normal()) end
  for _, x in ipairs(kind.head) do
    values[1 + math.floor(rng:uniform() * VOCABULARY)] = string.pack("<f", x)
  end
  local row, list = table.concat(values), {}
  for i = 1, ROWS do
    local at = (i - 1) * 15013 * 4
    list[i] = row:sub(at + 1) .. row:sub(1, at)
  end
  local tensor = core.tensor("f32", { ROWS, VOCABULARY }, table.concat(list))
  return function(i) return tensor:row(1 + i % ROWS) end
end

-- The median of single calls.
local function cost(n, fn)
  local took = {}
  for i = 1, n do
    local start = os.clock()
    fn(i)
    took[i] = os.clock() - start
  end
  table.sort(took)
  return took[(n + 1) // 2] * 1e3
end

-- ---- policies -------------------------------------------------------------------------------

local POLICIES <const> = {
  { "greedy", { temperature = 0 } },
  { "usual: temperature, top_k, top_p",
    { temperature = 0.6, top_k = 20, top_p = 0.95 } },
  { "and min_p, presence penalty",
    { temperature = 0.7, top_k = 20, top_p = 0.8, min_p = 0.01, presence_penalty = 1.5 } },
  { "and repetition penalty",
    { temperature = 0.7, top_k = 20, top_p = 0.8, repetition_penalty = 1.05 } },
  { "temperature alone", { temperature = 0.8 } },
  { "top_k 1000", { top_k = 1000 } },
  { "top_p alone", { top_p = 0.95 } },
  { "min_p alone", { min_p = 0.05 } },
  { "typical_p", { typical_p = 0.9 } },
}

local function measure_policies()
  local prompt, output = {}, {}
  for i = 1, 2048 do
    prompt[i] = math.floor(rng:uniform() * VOCABULARY)
    output[i] = math.floor(rng:uniform() * VOCABULARY)
  end
  local ctx = { prompt_ids = prompt, output_ids = output, n_vocab = VOCABULARY }
  print(("ms of a draw with its log probability, after %d tokens"):format(#prompt + #output))
  print(("%-34s %8s %8s %8s"):format("", "peaked", "open", "flat"))
  local rows = {}
  for i, kind in ipairs(KINDS) do rows[i] = rows_of(kind) end
  for _, entry in ipairs(POLICIES) do
    local line = { ("%-34s"):format(entry[1]) }
    for i = 1, #KINDS do
      entry[2].seed = 1
      local policy = sampler.from_options(entry[2])
      line[#line + 1] = ("%8.3f"):format(cost(draws, function(n)
        assert(policy:sample(rows[i](n), ctx))
      end))
    end
    print(table.concat(line, " "))
  end
  for _, call in ipairs { { "topk", 20 }, { "entropy" } } do
    local line = { ("%-34s"):format("logits:" .. call[1]) }
    for i = 1, #KINDS do
      line[#line + 1] = ("%8.3f"):format(cost(draws, function(n)
        local row = rows[i](n)
        assert(row[call[1]](row, call[2]))
      end))
    end
    print(table.concat(line, " "))
  end
end

-- ---- texts ----------------------------------------------------------------------------------

-- A session that computes nothing; ids take turns, of which some hundred are special.
local function idle_session(tokenizer, n_steps)
  local row = core.tensor("f32", { 1, 2 }, string.pack("<ff", 1, 0)):row(1)
  local session = { model = { tokenizer = tokenizer } }
  function session.logits() return row end
  function session.step() return true end
  function session.n_past() return 1 end
  function session.n_ctx() return n_steps + 2 end
  function session.ids() return { 1 } end
  return session
end

-- Draws nothing: any id, one after the other.
local function cycling(n)
  local at = 0
  return {
    sample = function()
      at = (at + 7919) % n
      return at, -1.0
    end,
    accept = function() end,
  }
end

local function measure_texts(dir)
  local tokenizer, problem = require("moonlet.tokenizer").open(dir)
  if not tokenizer then
    io.stderr:write("step: ", problem, "\n")
    os.exit(1)
  end
  local stops = { "\n\nUser:", "</answer>", "<|never|>", "Observation:" }
  local n = 20000
  print(("ms of a step: Lua, detokenizing %s"):format(dir))
  for _, case in ipairs { { "without stop strings" }, { "with 4 stop strings", stops } } do
    local took = cost(5, function()
      assert(generate.collect(idle_session(tokenizer, n), { max_tokens = n, stop = case[2],
        stop_ids = {}, sampler = cycling(tokenizer:n_vocab()) }))
    end)
    print(("%-34s %8.5f"):format(case[1], took / n))
  end
end

if what == "texts" then
  measure_texts(arg[2])
else
  measure_policies()
end
