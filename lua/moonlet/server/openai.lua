--- What OpenAI's chat and text completions have in common: usage, log-probabilities, ids.

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

---An id that no other reply has.
---@param prefix string
---@return string
function openai.new_id(prefix)
  return ("%s-%016x%08x"):format(prefix, math.random(0), math.random(0, 0xFFFFFFFF))
end

---What a client calls the model; one is served whatever its name.
---@param f moonlet.server.Fields
---@param server moonlet.Server
---@return string
function openai.model_name(f, server)
  return f:string("model") or server.name
end

---stream and stream_options.
---@param f moonlet.server.Fields
---@return boolean stream, boolean include_usage, boolean continuous
function openai.stream_options(f, fields)
  local stream = f:boolean("stream") or false
  local given = f:object("stream_options")
  if not given then return stream, false, false end
  if not stream then f:refuse("stream_options", "only with stream") end
  local o = fields.of(given, "stream_options.")
  return stream, o:boolean("include_usage") or false, o:boolean("continuous_usage_stats") or false
end

---The failure of a choice, as a refusal.
---@param part table of kind "end"
function openai.raise_failure(part, is_closing)
  if is_closing then refusal.raise(503, "the server is shutting down") end
  refusal.raise(500, part.message)
end

---@param tokenizer moonlet.Tokenizer
---@param id integer
---@return string text broken characters become U+FFFD in JSON
function openai.token_text(tokenizer, id)
  return tokenizer:token_bytes(id) or ""
end

return openai
