--- /v1/messages as OpenAPI describes it; moonlet.server.anthropic_messages serves it.

local sampling = require "moonlet.server.openapi.sampling"
local shape = require "moonlet.server.openapi.shape"

local always, any, list, nullable, object, ref = shape.always, shape.any, shape.list,
  shape.nullable, shape.object, shape.ref
local boolean, integer, text = { type = "boolean" }, { type = "integer" }, { type = "string" }

local schemas = {}

-- ---- requests ----------------------------------------------------------------------------------

local TEXT_BLOCK <const> = shape.request({ type = always "text", text = text }, { "text" })

local BLOCK <const> = any(TEXT_BLOCK,
  shape.request({ type = always "thinking", thinking = text, signature = text }, { "type" }),
  shape.request({ type = always "redacted_thinking" }, { "type" }),
  shape.request({ type = always "tool_use", id = text, name = text,
    input = { type = "object" } }, { "type", "name" }),
  shape.request({ type = always "tool_result", tool_use_id = text, is_error = boolean,
    content = any(text, list(any(TEXT_BLOCK,
      shape.request({ type = always "tool_reference", tool_name = text }, { "type" })))) },
    { "type" }))

schemas.MessagesMessage = shape.request({
  role = shape.one_of("user", "assistant", "system"),
  content = any(text, list(BLOCK)),
}, { "role" })

schemas.MessagesTool = shape.request({ name = { type = "string", minLength = 1 },
  description = text, input_schema = { type = "object", description = "a JSON schema" },
  type = always "custom", defer_loading = { type = "boolean",
    description = "described where a tool_reference names it" } }, { "name" })

local function request(limits)
  local properties = sampling()
  properties.stop_sequences, properties.stop = properties.stop, nil
  shape.with(properties, {
    model = { type = "string", description = "Any name is accepted." },
    messages = list(ref "MessagesMessage", { minItems = 1, maxItems = limits.messages }),
    system = any(list(TEXT_BLOCK), text),
    tools = list(ref "MessagesTool", { maxItems = limits.tools }),
    tool_choice = shape.request({ type = shape.one_of("auto", "none"),
      disable_parallel_tool_use = boolean }, { "type" }),
    thinking = shape.request({
      type = shape.one_of("enabled", "adaptive", "between_tools", "disabled"),
      budget_tokens = { type = "integer", minimum = 0 },
      display = { type = "string", description = "omitted: thoughts travel in signatures" },
    }, { "type" }),
    output_config = shape.request { effort = text },
    max_tokens = { type = "integer", minimum = 1 },
    stream = boolean,
  })
  shape.with(properties, shape.ignored("metadata", "service_tier", "context_management",
    "cache_control", "container", "mcp_servers"))
  return shape.request(properties, { "messages" })
end

-- ---- replies -----------------------------------------------------------------------------------

schemas.MessagesError = object { type = always "error", error = object { message = text,
  type = shape.one_of("invalid_request_error", "authentication_error", "permission_error",
    "not_found_error", "request_too_large", "rate_limit_error", "overloaded_error",
    "api_error") } }

schemas.MessagesUsage = object { input_tokens = integer, cache_creation_input_tokens = integer,
  cache_read_input_tokens = integer, output_tokens = integer,
  output_tokens_details = object { thinking_tokens = integer } }

schemas.MessagesBlock = any(
  object { type = always "text", text = text },
  object { type = always "thinking", thinking = text, signature = text },
  object { type = always "tool_use", id = text, name = text, input = { type = "object" } })

local STOP <const> = shape.one_of("end_turn", "max_tokens", "stop_sequence", "tool_use")

local function message(stop_reason)
  return object { id = text, type = always "message", role = always "assistant", model = text,
    content = list(ref "MessagesBlock"), stop_reason = stop_reason,
    stop_sequence = nullable(text), usage = ref "MessagesUsage" }
end

schemas.MessagesReply = message(STOP)

schemas.MessagesDelta = any(
  object { type = always "text_delta", text = text },
  object { type = always "thinking_delta", thinking = text },
  object { type = always "signature_delta", signature = text },
  object { type = always "input_json_delta", partial_json = text })

schemas.MessagesEvent = any(
  object { type = always "message_start", message = message { type = "null" } },
  object { type = always "ping" },
  object { type = always "content_block_start", index = integer,
    content_block = ref "MessagesBlock" },
  object { type = always "content_block_delta", index = integer, delta = ref "MessagesDelta" },
  object { type = always "content_block_stop", index = integer },
  object { type = always "message_delta", usage = ref "MessagesUsage",
    delta = object { stop_reason = STOP, stop_sequence = nullable(text) } },
  object { type = always "message_stop" },
  ref "MessagesError")

---@param limits table<string, integer>
return function(limits)
  return {
    schemas = shape.with({ MessagesRequest = request(limits) }, schemas),
    paths = {
      ["/v1/messages"] = { post = shape.operation { id = "message",
        summary = "Answers a conversation in Anthropic's dialect.", body = ref "MessagesRequest",
        fails = { 429 }, error = ref "MessagesError",
        reply = shape.streamed("The answer.", ref "MessagesReply", ref "MessagesEvent") } },
      ["/v1/messages/count_tokens"] = { post = shape.operation { id = "countTokens",
        summary = "Counts the tokens of the prompt that the same request would have.",
        body = ref "MessagesRequest", error = ref "MessagesError",
        reply = shape.reply("The number.", object { input_tokens = integer }) } },
    },
  }
end
