--- What OpenAI's chat and text completions have in common: usage, log-probabilities, ids.

local fields = require "moonlet.server.fields"
local json = require "moonlet.json"
local refusal = require "moonlet.server.refusal"

local openai = {}

---@param usage moonlet.server.Usage
---@return table
function openai.usage(usage)
  return json.object({
    prompt_tokens = usage.prompt,
    completion_tokens = usage.completion,
    total_tokens = usage.prompt + usage.completion,
    prompt_tokens_details = { cached_tokens = usage.cached },
    completion_tokens_details = { reasoning_tokens = usage.reasoning },
  }, { "prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details",
    "completion_tokens_details" })
end

---stream and stream_options.
---@param f moonlet.server.Fields
---@return boolean stream, boolean include_usage, boolean continuous
function openai.stream_options(f)
  local stream = f:boolean("stream") or false
  local given = f:object("stream_options")
  if not given then return stream, false, false end
  if not stream then f:refuse("stream_options", "only with stream") end
  local o = fields.of(given, "stream_options.")
  return stream, o:boolean("include_usage") or false, o:boolean("continuous_usage_stats") or false
end

-- One prompt: a text, or token ids.
local function read_prompt(f, name, given, model)
  if type(given) == "string" then
    return { ids = refusal.check(model:encode(given)), keep_at = {} }
  end
  if not json.is_array(given) then f:refuse(name, "texts or lists of token ids expected") end
  return { keep_at = {}, ids = fields.check_ids(given, model.tokenizer:n_vocab(),
    function(what) f:refuse(name, what) end) }
end

---A field that holds a text, token ids, or a list of those.
---@param f moonlet.server.Fields
---@param name string
---@param server moonlet.Server
---@return { ids: integer[], keep_at: integer[] }[]
function openai.prompts(f, name, server)
  local given = f:get(name)
  if given == nil then f:refuse(name, "a text expected") end
  if not json.is_array(given) or type(given[1]) == "number" then given = { given } end
  if #given == 0 then f:refuse(name, "at least one text expected") end
  if #given > server.limits.inputs then
    f:refuse(name, ("at most %d are possible"):format(server.limits.inputs))
  end
  local list = {}
  for i, one in ipairs(given) do list[i] = read_prompt(f, name, one, server.model) end
  return list
end

---@param tokenizer moonlet.Tokenizer
---@param id integer
---@return string text broken characters become U+FFFD in JSON
function openai.token_text(tokenizer, id)
  return tokenizer:token_bytes(id) or ""
end

return openai
