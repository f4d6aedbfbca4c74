--- /v1/messages and /v1/messages/count_tokens: Anthropic's dialect, over
--- moonlet.server.generation.
---
--- Shapes and the order of events are those of the `anthropic` SDK's types (2.12.0).

local blocks = require "moonlet.server.blocks"
local conversation = require "moonlet.server.conversation"
local fields = require "moonlet.server.fields"
local generation = require "moonlet.server.generation"
local json = require "moonlet.json"
local sampling = require "moonlet.server.sampling"
local sealed = require "moonlet.server.sealed"

local messages = {}

-- ---- errors ------------------------------------------------------------------------------------

local TYPES <const> = { [401] = "authentication_error", [403] = "permission_error",
  [404] = "not_found_error", [413] = "request_too_large", [429] = "rate_limit_error",
  [503] = "overloaded_error" }

---@param r moonlet.server.Refusal
---@return table body of the reply
function messages.error_body(r)
  local kind = TYPES[r.status] or r.status < 500 and "invalid_request_error" or "api_error"
  return json.object({ type = "error", error = json.object({ type = kind, message = r.message },
    { "type", "message" }) }, { "type", "error" })
end

-- ---- reading a request -------------------------------------------------------------------------

local function refuse_type(block, kind, supported)
  block:refuse("type", ("'%s' is not supported, only %s"):format(kind, supported))
end

local function read_text(block)
  return block:string("text") or block:refuse("text", "a string expected")
end

-- What a tool answered: a string, or blocks of text and of names of tools that were found, which
-- are described here as they were left out at the beginning.
local function result_of(block, deferred)
  if type(block:get("content")) == "string" then return block:get("content") end
  local texts = {}
  for i, part in ipairs(block:objects("content") or {}) do
    local kind = part:string("type") or "text"
    if kind == "tool_reference" then
      local tool = deferred[part:string("tool_name")]
      texts[i] = tool and ("<function>%s</function>\n"):format(json.encode(tool["function"])) or ""
    elseif kind == "text" then
      texts[i] = read_text(part)
    else
      refuse_type(part, kind, "text")
    end
  end
  return table.concat(texts)
end

-- What Claude Code counts its customers' money with changes from request to request, and would
-- keep a prompt from being recognised.
local function is_billing(text) return text:find("^x%-anthropic%-billing%-header:") ~= nil end

local function read_system(f, talk)
  if type(f:get("system")) == "string" then return talk:heard("system", f:get("system")) end
  for _, block in ipairs(f:objects("system") or {}) do
    local text = read_text(block)
    if not is_billing(text) then talk:heard("system", text) end
  end
end

-- By the type of a block: (block, talk, role, deferred).
local BLOCKS <const> = {}

function BLOCKS.text(block, talk, role)
  local text = read_text(block)
  if role == "assistant" then talk:said(text) else talk:heard(role, text) end
end

function BLOCKS.thinking(block, talk)
  local text = block:string("thinking") or ""
  talk:thought(text ~= "" and text or sealed.open(block:string("signature")) or "")
end

-- Nothing that this server made, and nothing that can be read.
function BLOCKS.redacted_thinking() end

function BLOCKS.tool_use(block, talk)
  local name = block:string("name") or block:refuse("name", "a string expected")
  talk:called(block:string("id"), name, block:object("input"))
end

function BLOCKS.tool_result(block, talk, _, deferred)
  local text = result_of(block, deferred)
  if block:boolean("is_error") then text = "Error: " .. text end
  talk:answered(block:string("tool_use_id"), text)
end

local ROLES <const> = { user = true, assistant = true, system = true }

local function read_message(message, talk, deferred)
  local role = message:string("role")
  if not ROLES[role] then message:refuse("role", "user, assistant or system expected") end
  local content = message:get("content")
  if type(content) == "string" then
    if role == "assistant" then return talk:said(content) end
    return talk:heard(role, content)
  end
  for _, block in ipairs(message:objects("content") or {}) do
    local kind = block:string("type") or "text"
    if not BLOCKS[kind] then refuse_type(block, kind, "text, thinking and tools") end
    BLOCKS[kind](block, talk, role, deferred)
  end
end

local function read_messages(f, server, deferred)
  local talk = conversation.new()
  read_system(f, talk)
  local given = f:objects("messages", server.limits.messages)
  if not given or #given == 0 then f:refuse("messages", "at least one message expected") end
  for _, message in ipairs(given) do read_message(message, talk, deferred) end
  return talk:done()
end

-- Tools that a prompt begins with, those that results of searches will name, and all of them.
local function read_tools(f, server)
  local first, deferred, all, known = json.array {}, {}, json.array {}, {}
  for i, tool in ipairs(f:objects("tools", server.limits.tools) or {}) do
    local kind = tool:string("type") or "custom"
    if kind ~= "custom" then
      tool:refuse("type", ("'%s' is a tool of Anthropic's servers; only custom ones are offered")
        :format(kind))
    end
    local name = tool:string("name") or tool:refuse("name", "a string expected")
    if known[name] then tool:refuse("name", ("there is a tool '%s' already"):format(name)) end
    known[name] = true
    all[i] = conversation.tool(name, tool:string("description"), tool:object("input_schema"))
    if tool:boolean("defer_loading") then
      deferred[name] = all[i]
    else
      first[#first + 1] = all[i]
    end
  end
  return first, deferred, all
end

-- How calls are read; whoever offers no tools wants text.
local function read_tool_choice(f, offered)
  local given = f:object("tool_choice")
  if not given then return { calls = offered, parallel = true } end
  local choice = fields.of(given, "tool_choice.")
  local kind = choice:string("type")
  if kind == "any" or kind == "tool" then
    choice:refuse_constraint("type", ("'%s'"):format(kind))
  elseif kind ~= "auto" and kind ~= "none" then
    choice:refuse("type", "auto, any, tool or none expected")
  end
  return { calls = offered and kind == "auto",
    parallel = not choice:boolean("disable_parallel_tool_use") }
end

local THINKS <const> = { enabled = true, adaptive = true, between_tools = true, disabled = false }

-- As Anthropic has it, who does not ask for thoughts gets none: programs take the first block for
-- the answer. What the server's own settings say of it comes before that.
local function read_thinking(f, variables, wanted)
  local given = f:object("thinking")
  if not given then
    if variables.enable_thinking == nil then variables.enable_thinking = false end
    return
  end
  local thinking = fields.of(given, "thinking.")
  local thinks = THINKS[thinking:string("type")]
  if thinks == nil then thinking:refuse("type", "enabled, disabled or adaptive expected") end
  variables.enable_thinking = thinks
  wanted.thinking_budget = thinks and thinking:integer("budget_tokens", 0) or nil
  return thinking:string("display") == "omitted"
end

local function read_output_config(f, variables)
  local given = f:object("output_config")
  if not given then return end
  local output = fields.of(given, "output_config.")
  if output:object("format") then output:refuse_constraint("format", "a format") end
  variables.reasoning_effort = output:string("effort")
end

---The request as the generation core takes it.
local function read(exchange)
  local server = exchange.server
  local f = fields.of(exchange:body())
  local r = { model = generation.model_name(f, server), id = generation.new_id("msg_"),
    stream = f:boolean("stream") or false }
  conversation.refuse_unserved(f)
  local variables = conversation.variables(server)
  local wanted = { n = 1, max_tokens = f:integer("max_tokens", 1),
    sampling = sampling.read(f, server, "stop_sequences") }
  r.hides_thinking = read_thinking(f, variables, wanted)
  read_output_config(f, variables)
  local deferred, all
  variables.tools, deferred, all = read_tools(f, server)
  local reading = read_tool_choice(f, #all > 0)
  reading.tools = all
  reading.new_id = function() return generation.new_id("toolu_") end
  local list = server.loop:gently(read_messages, f, server, deferred)
  -- The answer goes on with what the assistant is said to have begun with.
  local last = list[#list]
  local ending = last and last.role == "assistant" and "continue" or nil
  conversation.fill(wanted, server, list, variables, reading, ending)
  -- `input` is an object, which a call that is cut off never was.
  reading.stream_arguments = reading.stream_arguments and r.stream
  r.wanted = wanted
  return r
end

-- ---- replies -----------------------------------------------------------------------------------

-- Signatures prove nothing here, but clients drop thoughts without one.
local SIGNATURE <const> = "moonlet"

local function signature_of(block, r)
  return r.hides_thinking and sealed.close(block.text) or SIGNATURE
end

local function usage_of(run)
  local usage = run:usage()
  return json.object({ input_tokens = usage.prompt - usage.cached,
    cache_creation_input_tokens = 0, cache_read_input_tokens = usage.cached,
    output_tokens = usage.completion,
    output_tokens_details = { thinking_tokens = usage.reasoning } },
    { "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens",
      "output_tokens_details" })
end

-- Why the answer ended: a reason and, if it is that, the stop sequence.
local function stop_of(choice, ended)
  if ended.reason == "length" then return "max_tokens", json.null end
  if choice.n_calls > 0 then return "tool_use", json.null end
  if type(ended.stop_reason) == "string" then return "stop_sequence", ended.stop_reason end
  return "end_turn", json.null
end

local function message_of(r, run, content, reason, sequence)
  return json.object({ id = r.id, type = "message", role = "assistant", model = r.model,
    content = json.array(content), stop_reason = reason, stop_sequence = sequence,
    usage = usage_of(run) }, { "id", "type", "role", "model", "content", "stop_reason",
    "stop_sequence", "usage" })
end

-- A block as it begins in a stream, by its kind.
local EMPTY <const> = {
  content = function()
    return json.object({ type = "text", text = "" }, { "type", "text" })
  end,
  reasoning = function()
    return json.object({ type = "thinking", thinking = "", signature = "" },
      { "type", "thinking", "signature" })
  end,
  call = function(block)
    return json.object({ type = "tool_use", id = block.call.id, name = block.call.name,
      input = json.object {} }, { "type", "id", "name", "input" })
  end,
}

local function content_of(list, r)
  local content = {}
  for i, block in ipairs(list) do
    local made = EMPTY[block.kind](block)
    if block.kind == "content" then
      made.text = block.text
    elseif block.kind == "reasoning" then
      if not r.hides_thinking then made.thinking = block.text end
      made.signature = signature_of(block, r)
    else
      made.input = block.call.arguments
    end
    content[i] = made
  end
  return content
end

local function reply_whole(exchange, run, r)
  local list, ended = blocks.run(exchange, run, blocks.SILENT)
  if not list then return end
  exchange:reply(200, message_of(r, run, content_of(list, r), stop_of(run.choices[1], ended)))
end

-- ---- a stream ----------------------------------------------------------------------------------

local DELTA <const> = {
  content = function(text) return { type = "text_delta", text = text } end,
  reasoning = function(text) return { type = "thinking_delta", thinking = text } end,
  call = function(text) return { type = "input_json_delta", partial_json = text } end,
}

local function handler_of(stream, r)
  local handler = {}
  local function send(kind, block, value)
    value.type, value.index = kind, block.index
    stream:event(json.object(value, { "type", "index" }))
  end
  local function send_delta(block, delta)
    send("content_block_delta", block, { delta = json.object(delta, { "type" }) })
  end
  function handler.begin(block)
    send("content_block_start", block, { content_block = EMPTY[block.kind](block) })
  end
  function handler.grow(block, text)
    if block.kind == "reasoning" and r.hides_thinking then return end
    send_delta(block, DELTA[block.kind](text))
  end
  function handler.done(block)
    if block.kind == "reasoning" then
      send_delta(block, { type = "signature_delta", signature = signature_of(block, r) })
    end
    send("content_block_stop", block, {})
  end
  return handler
end

local function reply_stream(exchange, run, r)
  local stream = exchange:events()
  exchange.end_stream = function(body) stream:event(body) end
  stream:event(json.object({ type = "message_start",
    message = message_of(r, run, {}, json.null, json.null) }, { "type", "message" }))
  local function ping() stream:event { type = "ping" } end
  ping()
  local list, ended = blocks.run(exchange, run, handler_of(stream, r), function()
    return stream:beat(exchange.server.heartbeat, ping)
  end)
  if not list then return end
  local reason, sequence = stop_of(run.choices[1], ended)
  stream:event(json.object({ type = "message_delta", delta = json.object({ stop_reason = reason,
    stop_sequence = sequence }, { "stop_reason", "stop_sequence" }), usage = usage_of(run) },
    { "type", "delta", "usage" }))
  stream:event { type = "message_stop" }
  stream:finish()
end

---@param exchange moonlet.server.Exchange
function messages.post(exchange)
  local r = read(exchange)
  local reply = r.stream and reply_stream or reply_whole
  reply(exchange, generation.serve(exchange, { r.wanted }), r)
end

---The tokens of the prompt that the same request to /v1/messages would have.
---@param exchange moonlet.server.Exchange
function messages.count_tokens(exchange)
  exchange:reply(200, { input_tokens = read(exchange).wanted.prompt.n })
end

return messages
