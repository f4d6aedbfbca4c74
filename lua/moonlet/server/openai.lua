--- What OpenAI's chat and text completions have in common: usage, log-probabilities, ids.

local fields = require "moonlet.server.fields"
local json = require "moonlet.json"
local longer = require "moonlet.server.longer"
local refusal = require "moonlet.server.refusal"
local scoring = require "moonlet.server.scoring"

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

---Ends a stream.
---@param stream moonlet.server.Events
---@param run moonlet.server.Run
---@param last table? the chunk that has the usage, where it is asked for
function openai.end_stream(stream, run, last)
  if last then
    last.usage = openai.usage(run:usage())
    stream:data(last)
  end
  stream:data("[DONE]")
  stream:finish()
end

---@class moonlet.server.Text
---@field n integer how many tokens it has
---@field ids integer[]? these, unless they are more than fit in the context
---@field keep_at integer[] none

-- One prompt: a text, or token ids.
local function read_prompt(f, name, given, server)
  if type(given) == "string" then
    local list <close> = refusal.check(server.encode(given))
    return { n = #list, ids = #list <= server.engine.n_ctx and list:slice() or nil, keep_at = {} }
  end
  if not json.is_array(given) then f:refuse(name, "texts or lists of token ids expected") end
  local ids = server.loop:gently(fields.check_ids, given, server.model.tokenizer:n_vocab(),
    function(what) f:refuse(name, what) end)
  return { n = #ids, ids = ids, keep_at = {} }
end

---A field that holds a text, token ids, or a list of those.
---@param f moonlet.server.Fields
---@param name string
---@param server moonlet.Server
---@return moonlet.server.Text[]
function openai.prompts(f, name, server)
  local given = f:get(name)
  if given == nil then f:refuse(name, "a text expected") end
  if not json.is_array(given) or type(given[1]) == "number" then given = { given } end
  if #given == 0 then f:refuse(name, "at least one text expected") end
  if #given > server.limits.inputs then
    f:refuse(name, ("at most %d are possible"):format(server.limits.inputs))
  end
  local list = {}
  for i, one in ipairs(given) do list[i] = read_prompt(f, name, one, server) end
  return list
end

---@param tokenizer moonlet.Tokenizer
---@param id integer
---@return string text broken characters become U+FFFD in JSON
function openai.token_text(tokenizer, id)
  return tokenizer:token_bytes(id) or ""
end

---Log-probabilities of a prompt's tokens as vLLM has them: by id, null for the first.
---@param tokenizer moonlet.Tokenizer
---@param scores moonlet.server.Scores
---@param n_top integer
---@return moonlet.server.List
function openai.list_prompt(tokenizer, scores, n_top)
  return longer.list(scores.n, function(i, style)
    if i == 1 then return "null" end
    local by_id, own = json.object {}, scores:at(i, n_top)
    local function add(id, logprob, rank)
      by_id[("%d"):format(id)] = json.object({ logprob = logprob, rank = rank,
        decoded_token = openai.token_text(tokenizer, id) }, { "logprob", "rank", "decoded_token" })
    end
    for rank, other in ipairs(own.top) do add(other.id, other.logprob, rank) end
    if not by_id[("%d"):format(own.id)] then add(own.id, own.logprob, own.rank) end
    return json.encode(by_id, style)
  end)
end

---@param exchange moonlet.server.Exchange
---@param ids integer[]
---@param n_top integer
---@return moonlet.server.List? list nil when the client has gone
function openai.prompt_logprobs(exchange, ids, n_top)
  local scores = scoring.logprobs(exchange, ids, n_top)
  return scores and openai.list_prompt(exchange.server.model.tokenizer, scores, n_top)
end

return openai
