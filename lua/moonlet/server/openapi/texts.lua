--- What reads and continues texts, as OpenAPI describes it: completions, embeddings, tokens.

local sampling = require "moonlet.server.openapi.sampling"
local shape = require "moonlet.server.openapi.shape"

local any, list, nullable, object, ref = shape.any, shape.list, shape.nullable, shape.object,
  shape.ref
local boolean, integer, text, number = { type = "boolean" }, { type = "integer" },
  { type = "string" }, { type = "number" }
local id = { type = "integer", minimum = 0 }

-- A text, token ids, or several of either.
local function prompts(limits)
  return any(text, list(id, { minItems = 1 }),
    list(any(text, list(id)), { minItems = 1, maxItems = limits.inputs }))
end

local function completion_request(limits)
  local properties = {
    model = { type = "string", description = "Any name is accepted." },
    prompt = prompts(limits),
    suffix = { type = "string", description = "only \"\"" },
    max_tokens = { type = "integer", minimum = 0, description = "16; 0 only reads" },
    n = { type = "integer", minimum = 1, maximum = limits.choices },
    stream = boolean,
    stream_options = ref "StreamOptions",
    echo = boolean,
    logprobs = { type = "integer", minimum = 0, maximum = 20 },
    prompt_logprobs = { type = "integer", minimum = 0, maximum = 20 },
    return_token_ids = boolean,
  }
  shape.with(properties, sampling())
  shape.with(properties, shape.ignored("user", "best_of", "request_id", "priority"))
  return shape.request(properties, { "prompt" })
end

local schemas = {}

schemas.TextLogprobs = object {
  text_offset = list(integer),
  token_logprobs = list(nullable(number)),
  tokens = list(text),
  top_logprobs = list(nullable { type = "object", additionalProperties = number }),
}

schemas.PromptLogprob = object { logprob = number, rank = integer, decoded_token = text }

schemas.PromptLogprobs = list(nullable { type = "object",
  additionalProperties = ref "PromptLogprob", description = "by token id" })

local function choice(finish_reason)
  return object({ index = integer, text = text, logprobs = nullable(ref "TextLogprobs"),
    finish_reason = finish_reason, stop_reason = any(text, integer),
    prompt_logprobs = ref "PromptLogprobs",
    token_ids = list(id), prompt_token_ids = list(id) },
    { "stop_reason", "prompt_logprobs", "token_ids", "prompt_token_ids" })
end

schemas.TextChoice = choice(shape.one_of("stop", "length"))
schemas.TextChoicePiece = choice(nullable(shape.one_of("stop", "length")))

local function completion(choices, optional)
  return object({ id = text, object = shape.always "text_completion", created = integer,
    model = text, choices = choices, usage = ref "Usage" }, optional)
end

schemas.TextCompletion = completion(list(ref "TextChoice", { minItems = 1 }))
schemas.TextCompletionChunk = completion(list(ref "TextChoicePiece", { maxItems = 1 }),
  { "usage" })

schemas.Embeddings = object {
  object = shape.always "list",
  data = list(object { object = shape.always "embedding", index = integer,
    embedding = any(list(number), { type = "string", contentEncoding = "base64" }) }),
  model = text,
  usage = object { prompt_tokens = integer, total_tokens = integer },
}

---@param limits table<string, integer>
---@param variables table<string, table> of templates
return function(limits, variables)
  local requests = { CompletionRequest = completion_request(limits) }
  requests.EmbeddingsRequest = shape.request(shape.with({
    model = { type = "string", description = "Any name is accepted." },
    input = prompts(limits),
    encoding_format = shape.one_of("float", "base64"),
    dimensions = { type = "integer", minimum = 1, description = "keeps the first ones" },
  }, shape.ignored "user"), { "input" })
  requests.TokenizeRequest = shape.request(shape.with({
    prompt = text, messages = list(ref "Message", { minItems = 1, maxItems = limits.messages }),
    return_token_strs = boolean, add_generation_prompt = boolean, continue_final_message = boolean,
  }, shape.with(variables, shape.ignored("model", "add_special_tokens"))))
  requests.DetokenizeRequest = shape.request(shape.with({ tokens = list(id) },
    shape.ignored "model"), { "tokens" })
  return {
    schemas = shape.with(requests, schemas),
    paths = {
      ["/v1/completions"] = { post = shape.operation { id = "complete",
        summary = "Continues texts, and tells the log-probabilities of given ones.",
        body = ref "CompletionRequest", fails = { 429 },
        reply = shape.streamed("The texts.", ref "TextCompletion",
          any(ref "TextCompletionChunk", ref "Error", shape.always "[DONE]")) } },
      ["/v1/embeddings"] = { post = shape.operation { id = "embed",
        summary = "The last hidden state, averaged over the tokens of each input.",
        body = ref "EmbeddingsRequest", fails = { 429 },
        reply = shape.reply("The vectors.", ref "Embeddings") } },
      ["/tokenize"] = { post = shape.operation { id = "tokenize",
        summary = "The token ids of a text or a conversation.", body = ref "TokenizeRequest",
        reply = shape.reply("The ids.", object({ count = integer, max_model_len = integer,
          tokens = list(id), token_strs = list(text) }, { "token_strs" })) } },
      ["/detokenize"] = { post = shape.operation { id = "detokenize",
        summary = "The text of token ids.", body = ref "DetokenizeRequest",
        reply = shape.reply("The text.", object { prompt = text }) } },
    },
  }
end
