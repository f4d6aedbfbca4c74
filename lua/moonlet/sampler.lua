--- Sampling policies: a list of stages that narrow the candidates, and a draw from what is left.
--
--   local policy = moonlet.sampler{
--     { "temperature", 0.7 }, { "top_k", 20 },
--     function(c, ctx) if ctx.state.in_code then c:keep(1) end end,
--     seed = 42,
--   }
--   local id, logprob = policy:sample(session:logits(), { output_ids = ids })
--
-- Stages run in the order given, each on the renormalised result of the one before. A stage is a
-- native one by name, a function (candidates, context), or a table with apply(self, candidates,
-- context) and, where it has state, accept(self, id), reset(self) and clone(self). A stage that
-- cannot go on returns nil, message, code.
local core = require "moonlet.core"
local json = require "moonlet.json"
local options = require "moonlet.options"

---A row of numbers over the vocabulary, still in its session or tensor; ids from 0. argmax, topk,
---logprob and entropy answer nil, message, "range" when an entry is NaN or +inf or none is left.
---What changes it changes the session's logits and returns the view.
---@class moonlet.Logits
---@field n fun(self): integer also #logits
---@field get fun(self, id: integer): number
---@field argmax fun(self): integer?, string?, string? the lowest id of equal ones
---@field topk fun(self, k: integer): integer[]?, number[]|string, string? ids and logits
---@field logprob fun(self, id: integer): number?, string?, string?
---@field entropy fun(self): number?, string?, string? nats
---@field scale fun(self, factor: number): moonlet.Logits
---@field bias fun(self, by_id: table<integer, number>): moonlet.Logits adds; -inf rules out
---@field mask fun(self, keep: integer[]|string): moonlet.Logits all others out; a string is a bit
--- set, id = bit id % 8 of byte id // 8 + 1
---@field ban fun(self, ids_or_first: integer[]|integer, last?: integer): moonlet.Logits

---The tokens still in the running, best first: positions from 1 to #c, equal logits by id. Only
---valid while the stage runs. The native stages are methods too: temperature(t), top_k(k),
---top_p(p), min_p(p), typical_p(p), bias(by_id), repetition_penalty(r, prompt_ids, output_ids,
---last), penalty(output_ids, presence, frequency).
---@class moonlet.Candidates
---@field id fun(self, i: integer): integer
---@field logit fun(self, i: integer): number
---@field p fun(self, i: integer): number among the candidates left
---@field entropy fun(self): number nats
---@field set fun(self, i: integer, logit: number) positions stay until the next cut; -inf: out
---@field keep fun(self, n: integer) exactly the n best
---@field filter fun(self, fn: fun(id: integer, logit: number, p: number): any)
---@field pick fun(self, u?: number): integer?, string?, string? draws one, which alone is left;
--- u in [0, 1) instead of the policy's generator

local sampler = {}

-- ---- native stages ------------------------------------------------------------------------

local function need(ctx, key, stage)
  return ctx[key] or error(("%s needs ctx.%s"):format(stage, key), 0)
end

local function check_bias(bias)
  if type(bias) ~= "table" then return "logit_bias: table of numbers by token id expected" end
  for id, x in pairs(bias) do
    if math.type(id) ~= "integer" or id < 0 then
      return ("logit_bias: %s is not a token id"):format(tostring(id))
    end
    if math.type(x) == nil or x ~= x then
      return ("logit_bias: %s of id %d is not a number"):format(tostring(x), id)
    end
    if x > 1e100 then return ("logit_bias: %s of id %d is too large"):format(tostring(x), id) end
  end
end

-- name -> range of the parameter, the value that changes nothing, and the stage it makes.
-- check replaces the range where the parameter is no number.
local NATIVE <const> = {
  logit_bias = {
    check = check_bias,
    make = function(bias) return function(c) c:bias(bias) end end,
  },
  repetition_penalty = {
    from = 1e-6, to = 1e6, neutral = 1, extra = "last",
    make = function(r, last)
      return function(c, ctx)
        c:repetition_penalty(r, need(ctx, "prompt_ids", "repetition_penalty"),
          need(ctx, "output_ids", "repetition_penalty"), last)
      end
    end,
  },
  presence_penalty = {
    from = -1e6, to = 1e6, neutral = 0,
    make = function(x)
      return function(c, ctx) c:penalty(need(ctx, "output_ids", "presence_penalty"), x, 0) end
    end,
  },
  frequency_penalty = {
    from = -1e6, to = 1e6, neutral = 0,
    make = function(x)
      return function(c, ctx) c:penalty(need(ctx, "output_ids", "frequency_penalty"), 0, x) end
    end,
  },
  temperature = {
    from = 0, to = 1e6, neutral = 1,
    make = function(t) return function(c) c:temperature(t) end end,
  },
  top_k = {
    from = 0, to = math.maxinteger, integer = true, neutral = 0,
    make = function(k) return function(c) c:top_k(k) end end,
  },
  top_p = {
    from = 0, to = 1, neutral = 1,
    make = function(p) return function(c) c:top_p(p) end end,
  },
  min_p = {
    from = 0, to = 1, neutral = 0,
    make = function(p) return function(c) c:min_p(p) end end,
  },
  typical_p = {
    from = 0, to = 1, neutral = 1,
    make = function(p) return function(c) c:typical_p(p) end end,
  },
}

-- The order in which from_options lines stages up: penalties see the model's own logits, and what
-- is cut off is judged at the temperature it is drawn with.
local ORDER <const> = {
  "logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature",
  "top_k", "top_p", "min_p", "typical_p",
}

local function check_value(name, value)
  local native = NATIVE[name]
  if native.check then return native.check(value) end
  if math.type(value) == nil then
    return ("%s: number expected, got %s"):format(name, type(value))
  end
  if native.integer and not math.tointeger(value) then
    return ("%s: integer expected, got %s"):format(name, value)
  end
  if not (value >= native.from and value <= native.to) then
    if native.integer then return ("%s: 0 or more expected, got %s"):format(name, value) end
    return ("%s: %s is not in [%g, %g]"):format(name, value, native.from, native.to)
  end
end

local function native_stage(name, value, last)
  if NATIVE[name].integer then value = math.tointeger(value) end
  return { apply = NATIVE[name].make(value, last) }
end

-- { "name", value } -> stage, or nil and what is wrong
local function read_native(spec)
  local name = spec[1] == "typical" and "typical_p" or spec[1]
  local native = NATIVE[name]
  if not native then return nil, ("unknown stage '%s'"):format(spec[1]) end
  local message = check_value(name, spec[2])
  if message then return nil, message end
  for key in pairs(spec) do
    if key ~= 1 and key ~= 2 and key ~= native.extra then
      return nil, ("%s: unknown option '%s'"):format(name, tostring(key))
    end
  end
  if spec.last and (math.type(spec.last) ~= "integer" or spec.last < 1) then
    return nil, name .. ": last: positive integer expected"
  end
  return native_stage(name, spec[2], spec.last)
end

local function read_stage(spec)
  if type(spec) == "function" then return { apply = spec } end
  if type(spec) ~= "table" then
    return nil, "table or function expected, got " .. type(spec)
  end
  if type(spec[1]) == "string" then return read_native(spec) end
  if type(spec.apply) ~= "function" then
    return nil, "neither { name, value } nor a table with apply"
  end
  return { apply = function(c, ctx) return spec:apply(c, ctx) end, object = spec }
end

-- ---- the policy -----------------------------------------------------------------------------

---@class moonlet.Policy
---@field private stages table[]
---@field private rng table
---@field private fixed boolean whether the seed was given
local Policy = {}
Policy.__index = Policy

-- Candidates take up to 24 bytes per vocabulary entry and hold nothing between calls, so policies
-- share them. More than one is in use only while a stage samples with another policy or yields.
local Workspace = {}
local idle = {}

function Workspace:__close()
  self.candidates:release()
  idle[#idle + 1] = self
end

local function borrow()
  return table.remove(idle) or setmetatable({ candidates = core.candidates() }, Workspace)
end

---Draws a token.
---@param logits table moonlet.logits; not changed
---@param ctx? table given to the stages: prompt_ids and output_ids for penalties; n_vocab, ids from
---  which on are never drawn (the output matrix may have more rows than there are tokens)
---@return integer? id, number|string logprob of the id by the model, before any stage
---@return string? code
function Policy:sample(logits, ctx)
  ctx = ctx or {}
  local work <close> = borrow()
  local c = work.candidates
  local ok, message, code = c:load(logits, self.rng, ctx.n_vocab)
  if not ok then return nil, message, code end
  for _, stage in ipairs(self.stages) do
    ok, message, code = stage.apply(c, ctx)
    if not ok and message then return nil, message, code end
  end
  local id
  id, message, code = c:pick()
  if not id then return nil, message, code end
  return id, logits:logprob(id)
end

local function tell(self, method, ...)
  for _, stage in ipairs(self.stages) do
    local object = stage.object
    if object and object[method] then object[method](object, ...) end
  end
end

---Tells stages with state that id was appended.
---@param id integer
function Policy:accept(id)
  tell(self, "accept", id)
end

---Starts over: stages forget, and the generator begins again at `seed`, or at the seed that was
---given before; without one it takes a new one from the operating system.
---@param seed? integer
function Policy:reset(seed)
  tell(self, "reset")
  self.fixed = self.fixed or seed ~= nil
  self.rng = core.rng(seed or (self.fixed and self.rng:seed() or nil))
end

---@return integer seed that gives these draws again
function Policy:seed()
  return self.rng:seed()
end

---A policy that goes on from here independently, with the same draws to come.
---@return moonlet.Policy
function Policy:clone()
  local copy = { stages = {}, rng = self.rng:clone(), fixed = self.fixed }
  for i, stage in ipairs(self.stages) do
    local object = stage.object
    if object and object.clone then
      copy.stages[i] = read_stage(object:clone())
    elseif object and object.accept then
      options.misuse(("stage %d has accept but no clone"):format(i))
    else
      copy.stages[i] = stage
    end
  end
  return setmetatable(copy, Policy)
end

local function check_seed(seed)
  if seed ~= nil and math.type(seed) ~= "integer" then
    return "seed: integer expected, got " .. type(seed)
  end
end

local function new_policy(stages, seed)
  return setmetatable({ stages = stages, rng = core.rng(seed), fixed = seed ~= nil }, Policy)
end

---@param spec table stages in order, and seed
---@return moonlet.Policy
local function open(_, spec)
  if type(spec) ~= "table" then options.misuse("sampler: table of stages expected") end
  local stages = {}
  for i = 1, #spec do
    local stage, message = read_stage(spec[i])
    if not stage then options.misuse(("sampler: stage %d: %s"):format(i, message)) end
    stages[i] = stage
  end
  for key in pairs(spec) do
    if key ~= "seed" and not stages[key] then
      options.misuse(("sampler: unknown option '%s'"):format(tostring(key)))
    end
  end
  local message = check_seed(spec.seed)
  if message then options.misuse("sampler: " .. message) end
  return new_policy(stages, spec.seed)
end

-- ---- options --------------------------------------------------------------------------------

---Names that from_options takes.
---@type string[]
sampler.option_names = table.move(ORDER, 1, #ORDER, 1, {})
table.insert(sampler.option_names, "seed")

---Whether from_options would take these: for requests and command lines, whose mistakes are
---answered and not raised.
---@param given table
---@return boolean? ok, string? message, string? code
function sampler.check_options(given)
  for _, name in ipairs(ORDER) do
    local message = given[name] ~= nil and check_value(name, given[name])
    if message then return nil, message, "range" end
  end
  local message = check_seed(given.seed)
  if message then return nil, message, "range" end
  for key in pairs(given) do
    if not NATIVE[key] and key ~= "seed" then
      return nil, ("unknown option '%s'"):format(tostring(key)), "range"
    end
  end
  return true
end

---The usual policy: bias, penalties, temperature, top_k, top_p, min_p, typical_p, in this order.
---What is absent changes nothing; temperature 0 takes the best token.
---@param given table see sampler.option_names
---@param before? table[] stages that come first
---@return moonlet.Policy
function sampler.from_options(given, before)
  local ok, message = sampler.check_options(given)
  if not ok then options.misuse("sampler: " .. message) end
  local stages = {}
  for i, spec in ipairs(before or {}) do
    stages[i], message = read_stage(spec)
    if not stages[i] then options.misuse(("sampler: stage %d: %s"):format(i, message)) end
  end
  for _, name in ipairs(ORDER) do
    local value = given[name]
    if value ~= nil and value ~= NATIVE[name].neutral then
      stages[#stages + 1] = native_stage(name, value)
    end
  end
  return new_policy(stages, given.seed)
end

-- Of generation_config.json; "typical_p" and the penalties are transformers' names too.
local CONFIG_NAMES <const> =
  { "repetition_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p" }

---What a checkpoint recommends, as options. do_sample = false means the best token, and so does
---a file that says nothing about sampling, as in transformers.
---@param config? table content of generation_config.json
---@return table? options, string? message, string? code
function sampler.from_generation_config(config)
  local given, samples = {}, false
  config = config or {}
  for _, name in ipairs(CONFIG_NAMES) do
    local value = config[name]
    if value ~= nil and value ~= json.null then
      local message = check_value(name, value)
      if message then return nil, "generation_config.json: " .. message, "format" end
      given[name] = value
      samples = samples or name ~= "repetition_penalty"
    end
  end
  if config.do_sample == false or (config.do_sample == nil and not samples) then
    return { temperature = 0, repetition_penalty = given.repetition_penalty }
  end
  return given
end

return setmetatable(sampler, { __call = open })
