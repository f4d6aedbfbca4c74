--- /v1/chat/completions as OpenAPI describes it; moonlet.server.openai_chat serves it.

local json = require "moonlet.json"
local sampling = require "moonlet.server.openapi.sampling"
local shape = require "moonlet.server.openapi.shape"

local any, list, nullable, object, ref = shape.any, shape.list, shape.nullable, shape.object,
  shape.ref
local boolean, integer, text, number = { type = "boolean" }, { type = "integer" },
  { type = "string" }, { type = "number" }

local schemas = {}

-- ---- requests ----------------------------------------------------------------------------------

schemas.Message = shape.request({
  role = shape.one_of("system", "developer", "user", "assistant", "tool", "function"),
  content = any(text, list(any(text, shape.request({ type = text, text = text,
    refusal = text })))),
  name = text,
  reasoning_content = { type = "string", description = "also as reasoning or reasoning_text" },
  tool_calls = list(ref "MessageToolCall"),
  tool_call_id = text,
}, { "role" })

schemas.MessageToolCall = shape.request({ id = text, type = text,
  ["function"] = shape.request({ name = text,
    arguments = any(text, { type = "object" }) }, { "name" }) }, { "function" })

schemas.Tool = shape.request({ type = text,
  ["function"] = shape.request({ name = { type = "string", minLength = 1 }, description = text,
    parameters = { type = "object", description = "a JSON schema" }, strict = boolean },
    { "name" }) }, { "function" })

---Variables of the template, of which several endpoints take some.
---@param limits table<string, integer>
---@return table<string, table>
local function variables(limits)
  return {
    tools = list(ref "Tool", { maxItems = limits.tools }),
    enable_thinking = boolean,
    preserve_thinking = boolean,
    reasoning_effort = shape.one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    chat_template_kwargs = { type = "object", description = "variables of the template" },
  }
end

local function request(limits)
  local properties = {
    model = { type = "string", description = "Any name is accepted." },
    messages = list(ref "Message", { minItems = 1, maxItems = limits.messages }),
    tool_choice = any(shape.one_of("none", "auto", "required"), { type = "object",
      properties = json.object { ["function"] = object { name = text } },
      required = json.array { "function" } }),
    parallel_tool_calls = boolean,
    max_completion_tokens = { type = "integer", minimum = 1 },
    max_tokens = { type = "integer", minimum = 1 },
    n = { type = "integer", minimum = 1, maximum = limits.choices },
    stream = boolean,
    stream_options = ref "StreamOptions",
    logprobs = boolean,
    top_logprobs = { type = "integer", minimum = 0, maximum = 20 },
    thinking_token_budget = { type = "integer", minimum = 0 },
    include_reasoning = boolean,
    return_token_ids = boolean,
    add_generation_prompt = { type = "boolean",
      description = "false: the prompt ends where the messages do" },
    continue_final_message = { type = "boolean",
      description = "The last message, an assistant's text, goes on." },
    echo = { type = "boolean", description = "The answer begins with the message that goes on." },
    prompt_logprobs = { type = "integer", minimum = 0, maximum = 20,
      description = "of the prompt; not in streams" },
  }
  shape.with(properties, variables(limits))
  shape.with(properties, sampling())
  shape.with(properties, shape.ignored("user", "store", "metadata", "prompt_cache_key",
    "service_tier", "request_id", "priority", "cache_salt"))
  return shape.request(properties, { "messages" })
end

schemas.StreamOptions = shape.request { include_usage = boolean, continuous_usage_stats = boolean }

-- ---- replies -----------------------------------------------------------------------------------

schemas.Usage = object {
  prompt_tokens = integer, completion_tokens = integer, total_tokens = integer,
  prompt_tokens_details = object { cached_tokens = integer },
  completion_tokens_details = object { reasoning_tokens = integer },
}

local function logprob(more)
  return object(shape.with({ token = text, logprob = number,
    bytes = list { type = "integer", minimum = 0, maximum = 255 } }, more or {}))
end

schemas.Logprobs = object { content = list(logprob { top_logprobs = list(logprob()) }) }

schemas.ToolCall = object { id = text, type = shape.always "function",
  ["function"] = object { name = text, arguments = text } }

local FINISH <const> = shape.one_of("stop", "length", "tool_calls")
local REASONING <const> = { "reasoning_content", "reasoning" }

local function choice(said, finish_reason, more)
  local properties = shape.with({ index = integer, logprobs = nullable(ref "Logprobs"),
    finish_reason = finish_reason, stop_reason = any(text, integer),
    token_ids = list(integer) }, said)
  return object(properties, { "stop_reason", "token_ids", more })
end

schemas.ChatChoice = choice({ message = object({ role = shape.always "assistant",
  content = nullable(text), reasoning_content = text, reasoning = text,
  tool_calls = list(ref "ToolCall", { minItems = 1 }) },
  { "tool_calls", table.unpack(REASONING) }) }, FINISH)

schemas.ChatCompletion = object({ id = text, object = shape.always "chat.completion",
  created = integer, model = text, choices = list(ref "ChatChoice", { minItems = 1 }),
  usage = ref "Usage", system_fingerprint = text, prompt_token_ids = list(integer),
  prompt_logprobs = ref "PromptLogprobs" }, { "prompt_token_ids", "prompt_logprobs" })

schemas.ToolCallDelta = object({ index = integer, id = text, type = shape.always "function",
  ["function"] = object({ name = text, arguments = text }, { "name" }) }, { "id", "type" })

schemas.ChatChoiceDelta = choice({ delta = object({ role = shape.always "assistant",
  content = text, reasoning_content = text, reasoning = text,
  tool_calls = list(ref "ToolCallDelta") },
  { "role", "content", "tool_calls", table.unpack(REASONING) }) }, nullable(FINISH))

schemas.ChatCompletionChunk = object({ id = text, object = shape.always "chat.completion.chunk",
  created = integer, model = text, choices = list(ref "ChatChoiceDelta", { maxItems = 1 }),
  usage = ref "Usage", system_fingerprint = text }, { "usage" })

---@param limits table<string, integer>
return function(limits)
  return {
    schemas = shape.with({ ChatRequest = request(limits) }, schemas),
    variables = variables,
    paths = {
      ["/v1/chat/completions"] = { post = shape.operation { id = "chat",
        summary = "Answers a conversation.", body = ref "ChatRequest", fails = { 429 },
        reply = shape.streamed("The answer.", ref "ChatCompletion",
          any(ref "ChatCompletionChunk", ref "Error", shape.always "[DONE]")) } },
    },
  }
end
