--- /v1/responses as OpenAPI describes it; moonlet.server.openai_responses serves it.

local json = require "moonlet.json"
local sampling = require "moonlet.server.openapi.sampling"
local shape = require "moonlet.server.openapi.shape"

local always, any, list, nullable, object, ref = shape.always, shape.any, shape.list,
  shape.nullable, shape.object, shape.ref
local boolean, integer, number, text = { type = "boolean" }, { type = "integer" },
  { type = "number" }, { type = "string" }

local schemas = {}

-- ---- requests ----------------------------------------------------------------------------------

local TEXTS <const> = any(text, list(any(text, shape.request({ type = text, text = text }))))

schemas.ResponsesItem = any(
  shape.request({ type = nullable(always "message"), content = TEXTS,
    role = shape.one_of("user", "assistant", "system", "developer") }, { "role" }),
  shape.request({ type = always "reasoning", content = TEXTS, summary = TEXTS,
    encrypted_content = text }, { "type" }),
  shape.request({ type = always "function_call", call_id = text, name = text,
    arguments = any(text, { type = "object" }) }, { "type", "name" }),
  shape.request({ type = always "function_call_output", call_id = text, output = TEXTS },
    { "type" }))

local EFFORT <const> = shape.one_of("none", "minimal", "low", "medium", "high", "xhigh", "max")

local function request(limits)
  local properties = shape.with(sampling(), {
    model = { type = "string", description = "Any name is accepted." },
    input = any(list(ref "ResponsesItem", { minItems = 1, maxItems = limits.messages }), text),
    instructions = text,
    tools = list({ type = "object", description = "Functions; others are passed over." },
      { maxItems = limits.tools }),
    tool_choice = any(shape.one_of("none", "auto", "required"), { type = "object" }),
    parallel_tool_calls = boolean,
    reasoning = shape.request { effort = EFFORT,
      summary = shape.one_of("auto", "concise", "detailed", "none") },
    include = list({}),
    text = shape.request { format = { type = "object", required = json.array { "type" },
      properties = json.object { type = shape.one_of("text", "json_object", "json_schema") } } },
    max_output_tokens = { type = "integer", minimum = 1 },
    top_logprobs = { type = "integer", minimum = 0, description = "only 0" },
    metadata = { type = "object", description = "comes back in the response" },
    user = { description = "comes back in the response" },
    stream = boolean,
    background = boolean,
    store = { type = "boolean", description = "false: no request will go on from the answer" },
    previous_response_id = { type = "string", description = "of an answer to go on from" },
    conversation = { description = "refused, as there are none" },
    prompt = { description = "refused, as there are none" },
  })
  shape.with(properties, shape.ignored("truncation", "prompt_cache_key", "service_tier",
    "stream_options", "max_tool_calls", "safety_identifier", "client_metadata"))
  return shape.request(properties, { "input" })
end

-- ---- replies -----------------------------------------------------------------------------------

local STATUS <const> = shape.one_of("in_progress", "completed", "incomplete")

local PARTS <const> = {
  output_text = object { type = always "output_text", text = text,
    annotations = list(object {}), logprobs = list(object {}) },
  reasoning_text = object { type = always "reasoning_text", text = text },
  summary_text = object { type = always "summary_text", text = text },
}

schemas.ResponsesOutput = any(
  object { id = text, type = always "message", status = STATUS, role = always "assistant",
    content = list(PARTS.output_text) },
  object({ id = text, type = always "reasoning", status = STATUS,
    summary = list(PARTS.summary_text), content = list(PARTS.reasoning_text),
    encrypted_content = text }, { "content", "encrypted_content" }),
  object { id = text, type = always "function_call", status = STATUS, call_id = text, name = text,
    arguments = text })

schemas.ResponsesUsage = object { input_tokens = integer, output_tokens = integer,
  total_tokens = integer,
  input_tokens_details = object { cached_tokens = integer, cache_write_tokens = integer },
  output_tokens_details = object { reasoning_tokens = integer } }

schemas.Response = object({
  id = text, object = always "response", created_at = integer, completed_at = integer,
  status = shape.one_of("in_progress", "completed", "incomplete", "failed"),
  error = nullable(object { code = always "server_error", message = text }),
  incomplete_details = nullable(object { reason = always "max_output_tokens" }),
  output = list(ref "ResponsesOutput"), usage = nullable(ref "ResponsesUsage"),
  model = text, instructions = nullable(text), max_output_tokens = nullable(integer),
  metadata = { type = "object" }, parallel_tool_calls = boolean,
  previous_response_id = nullable(text),
  reasoning = object { effort = nullable(text), summary = nullable(text) },
  temperature = number, top_p = number, text = object { format = object { type = text } },
  tool_choice = any(text, { type = "object" }), tools = list { type = "object" },
  truncation = always "disabled", user = {}, background = boolean, store = boolean,
}, { "completed_at" })

local function event(name, properties)
  return object(shape.with({ type = always("response." .. name), sequence_number = integer },
    properties))
end

local function of_item(properties)
  return shape.with({ item_id = text, output_index = integer }, properties)
end

-- The events of a text that is a part of an item.
local function add_stretch(events, name, part, index, more)
  local function add(what, properties)
    properties[index] = integer
    events[#events + 1] = event(what, of_item(properties))
  end
  add(part .. ".added", { part = PARTS[more.type] })
  add(name .. ".delta", shape.with({ delta = text }, more.with))
  add(name .. ".done", shape.with({ text = text }, more.with))
  add(part .. ".done", { part = PARTS[more.type] })
end

local EVENTS <const> = {}
for _, name in ipairs { "created", "in_progress", "completed", "incomplete", "failed" } do
  EVENTS[#EVENTS + 1] = event(name, { response = ref "Response" })
end
for _, name in ipairs { "output_item.added", "output_item.done" } do
  EVENTS[#EVENTS + 1] = event(name, { output_index = integer, item = ref "ResponsesOutput" })
end
add_stretch(EVENTS, "output_text", "content_part", "content_index",
  { type = "output_text", with = { logprobs = list(object {}) } })
add_stretch(EVENTS, "reasoning_text", "content_part", "content_index",
  { type = "reasoning_text", with = {} })
add_stretch(EVENTS, "reasoning_summary_text", "reasoning_summary_part", "summary_index",
  { type = "summary_text", with = {} })
EVENTS[#EVENTS + 1] = event("function_call_arguments.delta", of_item { delta = text })
EVENTS[#EVENTS + 1] = event("function_call_arguments.done",
  of_item { name = text, arguments = text })
schemas.ResponsesEvent = any(table.unpack(EVENTS))

---@param limits table<string, integer>
return function(limits)
  return {
    schemas = shape.with({ ResponsesRequest = request(limits) }, schemas),
    paths = {
      ["/v1/responses"] = { post = shape.operation { id = "respond",
        summary = "Answers a conversation in OpenAI's newer dialect.",
        body = ref "ResponsesRequest", fails = { 429 },
        reply = shape.streamed("The answer.", ref "Response", ref "ResponsesEvent") } },
    },
  }
end
