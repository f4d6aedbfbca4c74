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
function openai.stream_options(f)
  local stream = f:boolean("stream") or false
  local given = f:object("stream_options")
  if not given then return stream, false, false end
  if not stream then f:refuse("stream_options", "only with stream") end
  local o = fields.of(given, "stream_options.")
  return stream, o:boolean("include_usage") or false, o:boolean("continuous_usage_stats") or false
end

---The prompt of a conversation. What its template refuses is the fault of the request; where it
---lies is left out.
---@param server moonlet.Server
---@param messages table
---@param variables table
---@return moonlet.Prompt
function openai.conversation(server, messages, variables)
  local prompt, message, code = server.prompts:make(messages, variables)
  if not prompt and message:sub(1, #server.model.dir + 1) == server.model.dir .. "/" then
    message = message:sub(#server.model.dir + 2)
  end
  return (refusal.check(prompt, message, code))
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
