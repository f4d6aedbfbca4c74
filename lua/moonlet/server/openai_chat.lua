--- /v1/chat/completions: OpenAI's dialect with vLLM's additions, over moonlet.server.generation.
---
--- A reply is a sequence of deltas; a reply that is not streamed is the same deltas put together.

local conversation = require "moonlet.server.conversation"
local fields = require "moonlet.server.fields"
local generation = require "moonlet.server.generation"
local json = require "moonlet.json"
local longer = require "moonlet.server.longer"
local openai = require "moonlet.server.openai"
local packed = require "moonlet.server.packed"
local sampling = require "moonlet.server.sampling"
local version = require "moonlet.version"

local chat = {}

local MAX_TOP_LOGPROBS <const> = 20
local FINGERPRINT <const> = "moonlet-" .. version

-- ---- reading a request -------------------------------------------------------------------------

-- What the server says to a template itself.
local RESERVED <const> = { messages = true, tools = true, add_generation_prompt = true }

---Variables of the template. What is said directly comes before what an effort implies.
---@param f moonlet.server.Fields
---@param server moonlet.Server
---@return table
function chat.template_variables(f, server)
  local variables = conversation.variables(server)
  conversation.read_effort(f, "reasoning_effort", variables)
  for _, name in ipairs { "enable_thinking", "preserve_thinking" } do
    local value = f:boolean(name)
    if value ~= nil then variables[name] = value end
  end
  for name, value in pairs(f:object("chat_template_kwargs") or {}) do
    if not RESERVED[name] and value ~= json.null then variables[name] = value end
  end
  variables.tools = f:list("tools", server.limits.tools)
  return variables
end

local function read_logprobs(f)
  local wanted, top = f:boolean("logprobs"), f:integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
  if top and top > 0 and not wanted then f:refuse("top_logprobs", "only with logprobs") end
  return wanted and (top or 0) or nil
end

-- How the prompt ends.
---@param f moonlet.server.Fields
---@return string? ending of moonlet.prompt
function chat.read_ending(f)
  local continues, begins = f:boolean("continue_final_message"),
    f:boolean("add_generation_prompt")
  if continues and begins then
    f:refuse("continue_final_message", "not with add_generation_prompt")
  end
  return continues and "continue" or begins == false and "none" or nil
end

---The request as the generation core takes it.
---@return table request { wanted =, stream =, include_usage =, continuous =, model =, ... }
local function read(exchange)
  local server = exchange.server
  local f = fields.of(exchange:body())
  local messages = f:list("messages", server.limits.messages)
  if not messages then f:refuse("messages", "a list expected") end
  local variables = chat.template_variables(f, server)
  -- As OpenAI and vLLM have it; an empty list, which Pi sends with earlier calls, is one.
  if f:get("tool_choice") == "auto" and not variables.tools then
    f:refuse("tool_choice", "only with tools")
  end
  local calls = conversation.read_tool_choice(f, variables.tools)
  conversation.refuse_unserved(f)
  local r = { model = generation.model_name(f, server) }
  r.stream, r.include_usage, r.continuous = openai.stream_options(f)
  r.include_reasoning = f:boolean("include_reasoning") ~= false
  r.token_ids = f:boolean("return_token_ids") or false
  local wanted = {
    sampling = sampling.read(f, server),
    n = f:integer("n", 1, server.limits.choices) or 1,
    max_tokens = f:integer("max_completion_tokens", 1) or f:integer("max_tokens", 1),
    logprobs = read_logprobs(f),
    thinking_budget = f:integer("thinking_token_budget", 0),
    hide_reasoning = not r.include_reasoning,
    is_whole = not r.stream,
  }
  conversation.fill(wanted, server, messages, variables,
    { calls = calls, parallel = f:boolean("parallel_tool_calls") ~= false }, chat.read_ending(f))
  r.echo = f:boolean("echo") and wanted.prompt.said or nil
  r.prompt_logprobs = f:integer("prompt_logprobs", 0, MAX_TOP_LOGPROBS)
  if r.stream and r.prompt_logprobs then f:refuse("prompt_logprobs", "not in streams") end
  r.wanted = wanted
  return r
end

-- ---- deltas ------------------------------------------------------------------------------------

local function call_delta(index, id, name, arguments)
  local inner = json.object({ name = name, arguments = arguments }, { "name", "arguments" })
  return { tool_calls = json.array { json.object({ index = index, id = id,
    type = id and "function" or nil, ["function"] = inner },
    { "index", "id", "type", "function" }) } }
end

-- part -> deltas. `state` remembers of a choice what was shown of a call that grows.
local DELTAS <const> = {}

function DELTAS.reasoning(part, _, r)
  if not r.include_reasoning then return {} end
  return { { [r.reasoning_field] = part.text } }
end

function DELTAS.content(part)
  return { { content = part.text } }
end

function DELTAS.call_start(part, state)
  state.growing = true
  return { call_delta(part.index, part.id, part.name, "") }
end

function DELTAS.call_arguments(part)
  return { call_delta(part.index, nil, nil, part.text) }
end

DELTAS["call"] = function(part, state)
  if state.growing then
    state.growing = false
    return {}
  end
  return { call_delta(part.index, part.id, part.name, ""),
    call_delta(part.index, nil, nil, json.encode(part.arguments)) }
end

-- What was to become a call is shown as it is, unless it has been shown as a call so far: its
-- arguments then stay open, so that nobody takes them for complete.
function DELTAS.unfinished(part, state)
  if state.growing then return {} end
  return { { content = part.text } }
end

local function finish_reason(choice, part)
  if part.reason == "stop" and choice.n_calls > 0 then return "tool_calls" end
  return part.reason
end

-- A token in JSON. An answer may list half a million of them, and objects, which remember the order
-- of their keys, would take several times as long and much for the collector to look through.
local function spell_entry(tokenizer, id, logprob, style, top)
  local bytes, between, colon = openai.token_text(tokenizer, id), table.unpack(style.separators)
  return ('{"token"%s%s%s"logprob"%s%s%s"bytes"%s[%s]%s}'):format(colon, json.quote(bytes), between,
    colon, json.float_repr(math.max(logprob, -9999.0)), between, colon,
    table.concat({ bytes:byte(1, -1) }, between),
    top and ('%s"top_logprobs"%s[%s]'):format(between, colon, table.concat(top, between)) or "")
end

-- Log-probabilities of the tokens since the last delta.
local function take_logprobs(choice, tokenizer)
  if not choice.wanted.logprobs then return json.null end
  local entries = choice:take_entries()
  return { content = longer.list(#entries, function(i, style)
    local token, top = packed.unpack(entries[i]), {}
    for k, other in ipairs(token.top) do
      top[k] = spell_entry(tokenizer, other.id, other.logprob, style)
    end
    return spell_entry(tokenizer, token.id, token.logprob, style, top)
  end) }
end

-- ---- a whole reply -----------------------------------------------------------------------------

local function merge_calls(message, deltas)
  message.tool_calls = message.tool_calls or json.array {}
  for _, delta in ipairs(deltas) do
    local call = message.tool_calls[delta.index + 1]
    if call then
      local inner = call["function"]
      inner.arguments = inner.arguments .. delta["function"].arguments
    else
      delta.index = nil
      message.tool_calls[#message.tool_calls + 1] = delta
    end
  end
end

local function merge(message, delta)
  for name, value in pairs(delta) do
    if name == "tool_calls" then
      merge_calls(message, value)
    else
      message[name] = (message[name] or "") .. value
    end
  end
end

local function message_of(collected, r)
  local reasoning = collected[r.reasoning_field]
  local content = collected.content
  if not content then
    content = (reasoning or collected.tool_calls) and json.null or ""
  end
  return json.object({ role = "assistant", content = content, [r.reasoning_field] = reasoning,
    tool_calls = collected.tool_calls }, { "role", "content", r.reasoning_field, "tool_calls" })
end

local function whole_choice(choice, ended, message, r, tokenizer)
  return json.object({ index = choice.index, message = message_of(message, r),
    logprobs = take_logprobs(choice, tokenizer), finish_reason = finish_reason(choice, ended),
    stop_reason = ended.stop_reason, token_ids = r.token_ids and json.array(choice.ids) or nil },
    { "index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids" })
end

local function reply_whole(exchange, run, r)
  local prompt_logprobs
  if r.prompt_logprobs then
    prompt_logprobs = openai.prompt_logprobs(exchange, r.wanted.prompt.ids, r.prompt_logprobs)
    if not prompt_logprobs then return end
  end
  local tokenizer, choices = exchange.server.model.tokenizer, json.array {}
  local messages, states = {}, {}
  for i = 1, #run.choices do messages[i], states[i] = { content = r.echo }, {} end
  local is_read = run:answer(exchange, function(choice, part)
    local at = choice.index + 1
    if part.kind == "end" then
      choices[at] = whole_choice(choice, part, messages[at], r, tokenizer)
      return
    end
    for _, delta in ipairs(DELTAS[part.kind](part, states[at], r)) do merge(messages[at], delta) end
  end)
  if not is_read then return end
  exchange:reply_longer(json.object({ id = r.id, object = "chat.completion", created = r.created,
    model = r.model, choices = choices, usage = openai.usage(run:usage()),
    system_fingerprint = FINGERPRINT, prompt_logprobs = prompt_logprobs,
    prompt_token_ids = r.token_ids and json.array(r.wanted.prompt.ids) or nil },
    { "id", "object", "created", "model", "choices", "usage", "system_fingerprint" }))
end

-- ---- a stream ----------------------------------------------------------------------------------

local function chunk(r, choices)
  return json.object({ id = r.id, object = "chat.completion.chunk", created = r.created,
    model = r.model, choices = json.array(choices), system_fingerprint = FINGERPRINT },
    { "id", "object", "created", "model", "choices", "system_fingerprint" })
end

local function choice_chunk(r, index, delta, logprobs, reason)
  return chunk(r, { json.object({ index = index, delta = json.object(delta),
    logprobs = logprobs, finish_reason = reason or json.null },
    { "index", "delta", "logprobs", "finish_reason" }) })
end

-- The chunks that a choice begins with.
local function first_chunks(r, choice)
  local role = json.object({ role = "assistant", content = "" }, { "role", "content" })
  local chunks = { choice_chunk(r, choice.index, role, json.null) }
  if r.echo then chunks[2] = choice_chunk(r, choice.index, { content = r.echo }, json.null) end
  return chunks
end

-- The chunks of a part of a choice.
local function chunks_of(r, choice, part, state, tokenizer)
  if part.kind == "end" then
    local last = choice_chunk(r, choice.index, {}, take_logprobs(choice, tokenizer),
      finish_reason(choice, part))
    last.choices[1].stop_reason = part.stop_reason
    if r.token_ids then last.choices[1].token_ids = json.array(choice.ids) end
    return { last }
  end
  local chunks = {}
  for i, delta in ipairs(DELTAS[part.kind](part, state, r)) do
    chunks[i] = choice_chunk(r, choice.index, delta, take_logprobs(choice, tokenizer))
  end
  return chunks
end

local function reply_stream(exchange, run, r)
  local stream, tokenizer, states = exchange:events(), exchange.server.model.tokenizer, {}
  local function send(chunks)
    for _, one in ipairs(chunks) do
      if r.continuous then one.usage = openai.usage(run:usage()) end
      if r.wanted.logprobs then stream:longer(one) else stream:data(one) end
    end
  end
  for i, choice in ipairs(run.choices) do
    states[i] = {}
    send(first_chunks(r, choice))
  end
  local is_read = run:answer(exchange, function(choice, part)
    if part.reason == "error" then return end
    send(chunks_of(r, choice, part, states[choice.index + 1], tokenizer))
  end, function()
    return stream:beat(exchange.server.heartbeat, function()
      stream:data(choice_chunk(r, 0, { content = "" }, json.null))
    end)
  end)
  if is_read then openai.end_stream(stream, run, r.include_usage and chunk(r, {}) or nil) end
end

---@param exchange moonlet.server.Exchange
function chat.post(exchange)
  local r = read(exchange)
  r.id, r.created = generation.new_id("chatcmpl-"), os.time()
  r.reasoning_field = exchange.server.reasoning_field
  local reply = r.stream and reply_stream or reply_whole
  reply(exchange, generation.serve(exchange, { r.wanted }), r)
end

return chat
