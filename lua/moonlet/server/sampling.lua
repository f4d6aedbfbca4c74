--- How a request wants tokens to be chosen: its own fields, else what the checkpoint recommends.

local hooks = require "moonlet.server.hooks"
local sampler = require "moonlet.sampler"

local sampling = {}

local MAX_STOPS <const> = 64
local MAX_STOP_BYTES <const> = 1024
local MAX_BIASES <const> = 4096

---@class moonlet.server.Sampling
---@field options table of moonlet.sampler
---@field stop string[]
---@field include_stop boolean stop strings are shown
---@field stop_ids integer[] asked for besides the model's
---@field ignore_eos boolean
---@field min_tokens integer
---@field skip_special boolean
---@field asked table those options that the request names itself
---@field request table the body, where an operator's functions see it; else of it what names a
---  policy, as values of a body take more memory than anything else that a request keeps

-- Of the request, in the order of moonlet.sampler's names.
local NUMBERS <const> = { "temperature", "top_p", "min_p", "typical_p", "repetition_penalty",
  "presence_penalty", "frequency_penalty" }

local function read_bias(f, n_vocab)
  local given = f:object("logit_bias")
  if not given then return nil end
  local bias, n = {}, 0
  for key, value in pairs(given) do
    local id = math.tointeger(tonumber(key))
    if not id or id < 0 or id >= n_vocab then
      f:refuse("logit_bias", ("'%s' is not a token id"):format(key))
    end
    if type(value) ~= "number" then f:refuse("logit_bias", "numbers expected") end
    bias[id] = value
    n = n + 1
    if n > MAX_BIASES then f:refuse("logit_bias", ("more than %d tokens"):format(MAX_BIASES)) end
  end
  return next(bias) and bias or nil
end

local function read_stops(f, field)
  local list = {}
  for _, text in ipairs(f:texts(field, MAX_STOPS) or {}) do
    if #text > MAX_STOP_BYTES then
      f:refuse(field, ("texts of at most %d bytes expected"):format(MAX_STOP_BYTES))
    end
    if text ~= "" then list[#list + 1] = text end
  end
  return list
end

local function merged(below, above)
  local all = {}
  for name, value in pairs(below) do all[name] = value end
  for name, value in pairs(above) do all[name] = value end
  return all
end

local function recommended(model)
  if not model.generation_config then return {} end
  return sampler.from_generation_config(model.generation_config) or {}
end

---@param f moonlet.server.Fields
---@param server moonlet.Server
---@param stops string? what the field of stop strings is called, "stop"
---@return moonlet.server.Sampling
function sampling.read(f, server, stops)
  local model = server.model
  local n_vocab = model.tokenizer:n_vocab()
  local asked = {}
  for _, name in ipairs(NUMBERS) do
    local value = f:number(name)
    if value ~= nil then asked[name] = value end
  end
  local top_k = f:integer("top_k", -1)
  if top_k then asked.top_k = math.max(0, top_k) end -- vLLM: -1 is off
  asked.seed = f:integer("seed")
  asked.logit_bias = read_bias(f, n_vocab)
  local ok, message = sampler.check_options(asked)
  if not ok then f:refuse(message:match("^([%w_]+): (.*)$")) end
  return {
    options = merged(recommended(model), asked),
    asked = asked,
    request = hooks.see_requests(server) and f.body
      or { model = f.body.model, policy = f.body.policy },
    stop = read_stops(f, stops or "stop"),
    include_stop = f:boolean("include_stop_str_in_output") or false,
    stop_ids = f:ids("stop_token_ids", n_vocab) or {},
    ignore_eos = f:boolean("ignore_eos") or false,
    min_tokens = f:integer("min_tokens", 0) or 0,
    skip_special = f:boolean("skip_special_tokens") ~= false,
  }
end

-- ---- stages that requests ask for --------------------------------------------------------------

-- No end before so many tokens.
local function min_tokens_stage(n, ids)
  local ban = {}
  for _, id in ipairs(ids) do ban[id] = -math.huge end
  return function(c, ctx)
    if #ctx.output_ids < n then c:bias(ban) end
  end
end

-- Above every logit, and still a number.
local CERTAIN <const> = 1e30

---A stage that ends reasoning after so many tokens of it, with the tokens given.
---@param budget integer
---@param ids integer[] that end it
---@param reader moonlet.turn.Reader of the same text
---@return table
function sampling.thinking_stage(budget, ids, reader)
  local n, at = 0, nil
  return {
    apply = function(_, c)
      if not at and n >= budget and reader:is_reasoning() then at = 1 end
      if at and ids[at] then
        c:bias({ [ids[at]] = CERTAIN })
        c:keep(1)
      end
    end,
    accept = function()
      if reader:in_reasoning() then n = n + 1 end
      if at then at = at + 1 end
    end,
  }
end

---Options of a generation.
---@param s moonlet.server.Sampling
---@param model moonlet.Model
---@param given { choice: integer, max_tokens: integer, logprobs: integer?, stages: table[],
---  policy: table? } policy: options in the place of the checkpoint's, or stages
---@return table options of Session:generate
function sampling.options(s, model, given)
  local stop_ids = table.move(s.stop_ids, 1, #s.stop_ids, 1, {})
  if not s.ignore_eos then
    table.move(model.stop_ids, 1, #model.stop_ids, #stop_ids + 1, stop_ids)
  end
  local stages = given.stages
  if s.min_tokens > 0 then stages[#stages + 1] = min_tokens_stage(s.min_tokens, stop_ids) end
  local chosen = merged(s.options, {})
  if given.policy and #given.policy == 0 then
    chosen = merged(given.policy, s.asked)
  elseif given.policy then
    if s.asked.logit_bias then stages[#stages + 1] = { "logit_bias", s.asked.logit_bias } end
    table.move(given.policy, 1, #given.policy, #stages + 1, stages)
    chosen = { seed = s.asked.seed or given.policy.seed }
  end
  if chosen.seed then chosen.seed = chosen.seed + given.choice end
  return {
    sampler = sampler.from_options(chosen, stages),
    stop_ids = stop_ids,
    max_tokens = given.max_tokens,
    skip_special = s.skip_special,
    top_logprobs = given.logprobs,
  }
end

return sampling
