--- /v1/responses: OpenAI's newer dialect, over moonlet.server.generation.
---
--- Shapes and the order of events are those of the `openai` SDK's types (2.54.0).

local blocks = require "moonlet.server.blocks"
local chat = require "moonlet.chat"
local conversation = require "moonlet.server.conversation"
local fields = require "moonlet.server.fields"
local generation = require "moonlet.server.generation"
local json = require "moonlet.json"
local refusal = require "moonlet.server.refusal"
local sampling = require "moonlet.server.sampling"
local sealed = require "moonlet.server.sealed"

local responses = {}

-- ---- reading a request -------------------------------------------------------------------------

-- Text of a string or of a list of parts that carry some.
local function text_of(item, name)
  return (refusal.check(chat.text(item:get(name), item.path .. name)))
end

local ROLES <const> = { user = true, assistant = true, system = true, developer = true }

-- By the type of an item: (item, talk).
local ITEMS <const> = {}

function ITEMS.message(item, talk)
  local role = item:string("role")
  if not ROLES[role] then
    item:refuse("role", "user, assistant, system or developer expected")
  end
  local text = text_of(item, "content")
  if role == "assistant" then talk:said(text) else talk:heard(role, text) end
end

-- Clients send back what they kept: what was sealed for them, or what they could read.
function ITEMS.reasoning(item, talk)
  local text = sealed.open(item:get("encrypted_content"))
  if not text then
    text = text_of(item, "content")
    if text == "" then text = text_of(item, "summary") end
  end
  talk:thought(text)
end

ITEMS["function_call"] = function(item, talk)
  local name = item:string("name") or item:refuse("name", "a string expected")
  talk:called(item:string("call_id"), name, item:get("arguments"))
end

function ITEMS.function_call_output(item, talk)
  talk:answered(item:string("call_id"), text_of(item, "output"))
end

-- The conversation that the request goes on with, if it names one.
local function earlier(f, server)
  local id = f:string("previous_response_id")
  if not id then return nil end
  local messages = server.stored:get(id)
  if messages then return messages end
  return refusal.raise(400, ("Previous response with id '%s' not found."):format(id),
    { param = "previous_response_id", code = "previous_response_not_found" })
end

local function read_input(f, server)
  local talk = conversation.new(earlier(f, server))
  local instructions = f:string("instructions")
  if instructions then talk:instruct(instructions) end
  if type(f:get("input")) == "string" then
    talk:heard("user", f:get("input"))
    return talk
  end
  local given = f:objects("input", server.limits.messages)
  if not given or #given == 0 then f:refuse("input", "a text or a list of items expected") end
  for _, item in ipairs(given) do
    local kind = item:string("type") or "message"
    if kind == "item_reference" then item:refuse("type", "nothing is stored that it could mean") end
    if not ITEMS[kind] then item:refuse("type", ("'%s' is not supported"):format(kind)) end
    ITEMS[kind](item, talk)
  end
  return talk
end

-- Functions. Tools that OpenAI's servers would run are passed over: codex lists some always.
local function read_tools(f, server)
  local tools = json.array {}
  for _, tool in ipairs(f:objects("tools", server.limits.tools) or {}) do
    if tool:string("type") == "function" then
      local name = tool:string("name") or tool:refuse("name", "a string expected")
      tools[#tools + 1] = conversation.tool(name, tool:string("description"),
        tool:object("parameters"))
    end
  end
  return tools
end

local SUMMARIES <const> = { auto = true, concise = true, detailed = true }

-- Whether reasoning comes as a summary (which is all of it) and not as what it is.
local function read_reasoning(f, variables)
  local given = f:object("reasoning")
  if not given then return false end
  local reasoning = fields.of(given, "reasoning.")
  conversation.read_effort(reasoning, "effort", variables)
  local summary = reasoning:string("summary")
  if summary and summary ~= "none" and not SUMMARIES[summary] then
    reasoning:refuse("summary", "auto, concise, detailed or none expected")
  end
  return SUMMARIES[summary] or false
end

-- Whether a client wants what it is to send back in one piece.
local function read_include(f)
  local seals = false
  for _, name in ipairs(f:array("include") or {}) do
    if name == "message.output_text.logprobs" then
      f:refuse("include", "log-probabilities are offered by /v1/chat/completions")
    end
    seals = seals or name == "reasoning.encrypted_content"
  end
  return seals
end

local function refuse_unserved(f)
  conversation.refuse_unserved(f)
  if f:get("conversation") then
    f:refuse("conversation", "there are none; send it as input, or name a previous_response_id")
  end
  if f:get("prompt") then f:refuse("prompt", "there are no stored prompts") end
  if f:boolean("background") then f:refuse("background", "answers are not kept for later") end
  if (f:integer("top_logprobs", 0) or 0) > 0 then
    f:refuse("top_logprobs", "log-probabilities are offered by /v1/chat/completions")
  end
  local text = f:object("text")
  if text then conversation.refuse_format(fields.of(text, "text."), "format") end
end

-- What a response repeats of its request.
local function echo_of(f, r)
  local reasoning = f:object("reasoning") or {}
  local chosen = r.wanted.sampling.options
  return { object = "response", background = false, store = r.stores, model = r.model,
    instructions = f:get("instructions") or json.null,
    max_output_tokens = r.wanted.max_tokens or json.null,
    metadata = f:object("metadata") or json.object {},
    parallel_tool_calls = r.wanted.reading.parallel,
    previous_response_id = f:get("previous_response_id") or json.null,
    reasoning = { effort = reasoning.effort or json.null,
      summary = reasoning.summary or json.null },
    temperature = chosen.temperature or 1.0, top_p = chosen.top_p or 1.0,
    text = { format = { type = "text" } }, tool_choice = f:get("tool_choice") or "auto",
    tools = f:array("tools") or json.array {}, truncation = "disabled",
    user = f:get("user") or json.null }
end

---The request as the generation core takes it.
local function read(exchange)
  local server = exchange.server
  local f = fields.of(exchange:body())
  local r = { model = generation.model_name(f, server), id = generation.new_id("resp_"),
    created = os.time(), stream = f:boolean("stream") or false }
  refuse_unserved(f)
  local variables = conversation.variables(server)
  r.summarises = read_reasoning(f, variables)
  r.seals = read_include(f)
  variables.tools = read_tools(f, server)
  r.wanted = { n = 1, max_tokens = f:integer("max_output_tokens", 1),
    sampling = sampling.read(f, server) }
  r.stores, r.talk = f:boolean("store") ~= false, server.loop:gently(read_input, f, server)
  conversation.fill(r.wanted, server, r.talk:done(), variables,
    { calls = conversation.read_tool_choice(f, variables.tools),
      parallel = f:boolean("parallel_tool_calls") ~= false })
  r.echo = echo_of(f, r)
  return r
end

-- ---- items -------------------------------------------------------------------------------------

local PREFIXES <const> = { content = "msg_", reasoning = "rs_", ["call"] = "fc_" }

local function name_block(block)
  block.item_id = generation.new_id(PREFIXES[block.kind])
end

-- What a block of text is made of: the type of its part, the names of events and of its index.
local function stretch_of(block, r)
  if block.kind == "content" then
    return { type = "output_text", text = "response.output_text", part = "response.content_part",
      index = "content_index" }
  elseif r.summarises then
    return { type = "summary_text", text = "response.reasoning_summary_text",
      part = "response.reasoning_summary_part", index = "summary_index" }
  end
  return { type = "reasoning_text", text = "response.reasoning_text",
    part = "response.content_part", index = "content_index" }
end

local function part_of(stretch, text)
  local part = { type = stretch.type, text = text }
  if stretch.type == "output_text" then
    part.annotations, part.logprobs = json.array {}, json.array {}
  end
  return json.object(part, { "type", "text" })
end

local ITEM_KEYS <const> = { "id", "type", "status", "role", "call_id", "name", "arguments",
  "summary", "content", "encrypted_content" }

-- The item that a block is, as it begins or as it has become.
local function item_of(block, r, begins)
  local item = { id = block.item_id,
    status = begins and "in_progress" or block.is_cut and "incomplete" or "completed" }
  if block.kind == "call" then
    item.type, item.call_id, item.name = "function_call", block.call.id, block.call.name
    item.arguments = begins and "" or block.text
    return json.object(item, ITEM_KEYS)
  end
  local parts = json.array { not begins and part_of(stretch_of(block, r), block.text) or nil }
  if block.kind == "content" then
    item.type, item.role, item.content = "message", "assistant", parts
  else
    item.type = "reasoning"
    item.summary = r.summarises and parts or json.array {}
    item.content = not r.summarises and parts or nil
    item.encrypted_content = r.seals and not begins and sealed.close(block.text) or nil
  end
  return json.object(item, ITEM_KEYS)
end

local function items_of(list, r)
  local items = {}
  for i, block in ipairs(list) do items[i] = item_of(block, r) end
  return items
end

-- ---- responses ---------------------------------------------------------------------------------

local function usage_of(run)
  local usage = run:usage()
  return json.object({ input_tokens = usage.prompt,
    input_tokens_details = { cached_tokens = usage.cached, cache_write_tokens = 0 },
    output_tokens = usage.completion,
    output_tokens_details = { reasoning_tokens = usage.reasoning },
    total_tokens = usage.prompt + usage.completion },
    { "input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details",
      "total_tokens" })
end

local KEYS <const> = { "id", "object", "created_at", "status", "error", "incomplete_details",
  "model", "output", "usage" }

local function response_of(r, status, items, more)
  local response = { id = r.id, created_at = r.created, status = status, error = json.null,
    incomplete_details = json.null, output = json.array(items), usage = json.null }
  for _, set in ipairs { r.echo, more or {} } do
    for name, value in pairs(set) do response[name] = value end
  end
  return json.object(response, KEYS)
end

-- Keeps the conversation with the answer, for requests that go on from it.
local function store(server, list, r)
  if not r.stores then return end
  local talk = conversation.new(r.talk:lasting())
  for _, block in ipairs(list) do
    if block.kind == "content" then
      talk:said(block.text)
    elseif block.kind == "reasoning" then
      talk:thought(block.text)
    else
      talk:called(block.call.id, block.call.name, block.text)
    end
  end
  server.stored:put(r.id, talk:done())
end

local function ended_response(r, run, list, ended)
  local items, usage = items_of(list, r), usage_of(run)
  if ended.reason == "length" then
    return response_of(r, "incomplete", items, { usage = usage,
      incomplete_details = { reason = "max_output_tokens" } })
  end
  return response_of(r, "completed", items, { usage = usage, completed_at = os.time() })
end

local function reply_whole(exchange, run, r)
  local handler = setmetatable({ begin = name_block }, { __index = blocks.SILENT })
  local list, ended = blocks.run(exchange, run, handler)
  if not list then return end
  store(exchange.server, list, r)
  exchange:reply(200, ended_response(r, run, list, ended))
end

-- ---- a stream ----------------------------------------------------------------------------------

-- Sends events with their numbers.
local function sender_of(stream)
  local n = -1
  return function(kind, value)
    n = n + 1
    value.type, value.sequence_number = kind, n
    stream:event(json.object(value, { "type", "sequence_number" }))
  end
end

local function handler_of(send, r)
  local handler = {}
  -- An event about the only part of a text, or about the arguments of a call.
  local function send_part(kind, block, value)
    value.item_id, value.output_index = block.item_id, block.index
    if block.kind ~= "call" then value[stretch_of(block, r).index] = 0 end
    send(kind, value)
  end
  -- Texts of messages, and only they, have log-probabilities, of which there are none.
  local function logprobs_of(block)
    return block.kind == "content" and json.array {} or nil
  end
  function handler.begin(block)
    name_block(block)
    send("response.output_item.added", { output_index = block.index,
      item = item_of(block, r, true) })
    if block.kind == "call" then return end
    local stretch = stretch_of(block, r)
    send_part(stretch.part .. ".added", block, { part = part_of(stretch, "") })
  end
  function handler.grow(block, text)
    local name = block.kind == "call" and "response.function_call_arguments"
      or stretch_of(block, r).text
    send_part(name .. ".delta", block, { delta = text, logprobs = logprobs_of(block) })
  end
  function handler.done(block)
    if block.kind == "call" then
      send_part("response.function_call_arguments.done", block,
        { name = block.call.name, arguments = block.text })
    else
      local stretch = stretch_of(block, r)
      send_part(stretch.text .. ".done", block,
        { text = block.text, logprobs = logprobs_of(block) })
      send_part(stretch.part .. ".done", block, { part = part_of(stretch, block.text) })
    end
    send("response.output_item.done", { output_index = block.index, item = item_of(block, r) })
  end
  return handler
end

local function reply_stream(exchange, run, r)
  local stream = exchange:events()
  local send = sender_of(stream)
  exchange.end_stream = function(body)
    send("response.failed", { response = response_of(r, "failed", {}, { usage = usage_of(run),
      error = { code = "server_error", message = body.error.message } }) })
  end
  local function in_progress(kind) send(kind, { response = response_of(r, "in_progress", {}) }) end
  in_progress("response.created")
  in_progress("response.in_progress")
  local list, ended = blocks.run(exchange, run, handler_of(send, r), function()
    return stream:beat(exchange.server.heartbeat, function()
      in_progress("response.in_progress")
    end)
  end)
  if not list then return end
  store(exchange.server, list, r)
  local response = ended_response(r, run, list, ended)
  send("response." .. response.status, { response = response })
  stream:finish()
end

---@param exchange moonlet.server.Exchange
function responses.post(exchange)
  local r = read(exchange)
  local reply = r.stream and reply_stream or reply_whole
  reply(exchange, generation.serve(exchange, { r.wanted }), r)
end

return responses
