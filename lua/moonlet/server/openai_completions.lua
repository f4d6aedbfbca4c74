--- /v1/completions: texts that go on, and log-probabilities of texts that are given.

local conversation = require "moonlet.server.conversation"
local fields = require "moonlet.server.fields"
local generation = require "moonlet.server.generation"
local json = require "moonlet.json"
local longer = require "moonlet.server.longer"
local openai = require "moonlet.server.openai"
local packed = require "moonlet.server.packed"
local sampling = require "moonlet.server.sampling"
local scoring = require "moonlet.server.scoring"

local completions = {}

local DEFAULT_TOKENS <const> = 16 -- OpenAI's
local MAX_LOGPROBS <const> = 20

-- ---- reading a request -------------------------------------------------------------------------

local function read(exchange)
  local server = exchange.server
  local f = fields.of(exchange:body())
  local r = { model = generation.model_name(f, server), id = generation.new_id("cmpl-"),
    created = os.time(), server = server }
  conversation.refuse_unserved(f)
  r.stream, r.include_usage, r.continuous = openai.stream_options(f)
  r.echo = f:boolean("echo") or false
  r.logprobs = f:integer("logprobs", 0, MAX_LOGPROBS)
  r.prompt_logprobs = f:integer("prompt_logprobs", 0, MAX_LOGPROBS)
  r.n = f:integer("n", 1, server.limits.choices) or 1
  r.token_ids = f:boolean("return_token_ids") or false
  if f:get("suffix") and f:get("suffix") ~= "" then
    f:refuse("suffix", "texts can only be continued at their end")
  end
  local max_tokens = f:integer("max_tokens", 0) or DEFAULT_TOKENS
  r.generates = max_tokens > 0
  if not r.generates and not r.echo and not r.prompt_logprobs then
    f:refuse("max_tokens", "1 or more expected, except with echo or prompt_logprobs")
  end
  local chosen = sampling.read(f, server)
  r.wanted = {}
  for i, prompt in ipairs(openai.prompts(f, "prompt", server)) do
    r.wanted[i] = { prompt = prompt, sampling = chosen, n = r.generates and r.n or 0,
      max_tokens = max_tokens, logprobs = r.logprobs, is_whole = not r.stream }
  end
  if #r.wanted * r.n > server.limits.choices then
    f:refuse("prompt", ("at most %d choices of all prompts together are possible")
      :format(server.limits.choices))
  end
  return r
end

-- ---- log-probabilities -------------------------------------------------------------------------

-- What has been shown of a choice, for offsets of its tokens in characters.
local function new_state(tokenizer)
  return { stream = tokenizer:stream { skip_special = false }, offset = 0, text = "" }
end

local ESCAPED <const> = "[\0-\31\\\127-\255]"

-- A token's text; parts of characters in OpenAI's spelling of bytes ("bytes:\xe9\x80"), as there
-- is no field for them here. Without it several of them would be one key of top_logprobs.
local function token_text(tokenizer, id)
  local bytes = openai.token_text(tokenizer, id)
  if utf8.len(bytes) then return bytes end
  return "bytes:" .. bytes:gsub(ESCAPED, function(c) return ("\\x%02x"):format(c:byte()) end)
end

local function top_of(tokenizer, token)
  if not token.logprob then return json.null end
  local top = json.object {}
  for _, other in ipairs(token.top) do
    top[token_text(tokenizer, other.id)] = other.logprob
  end
  top[token_text(tokenizer, token.id)] = token.logprob
  return top
end

-- Where a token begins.
local function next_offset(state, id)
  local offset = state.offset
  state.offset = offset + (utf8.len(state.stream:step(id) or "") or 0)
  return offset
end

-- What is listed of a choice: first of the prompt, where that is echoed, then of the answer.
local function list_tokens(state, entries)
  local listed = { n_scores = 0, offsets = {}, entries = entries }
  for i, entry in ipairs(entries) do
    listed.offsets[i] = next_offset(state, packed.unpack(entry).id)
  end
  return listed
end

local LISTS <const> = { "text_offset", "token_logprobs", "tokens", "top_logprobs" }

-- What the four lists are in JSON.
local function lists_of(r, listed)
  local tokenizer = r.server.model.tokenizer
  local function list(spell)
    return longer.list(#listed.offsets, function(i, style)
      local at = i - listed.n_scores
      return json.encode(spell(at > 0 and packed.unpack(listed.entries[at])
        or listed.scores:at(i, r.logprobs)), style)
    end)
  end
  return json.object({ text_offset = json.array(listed.offsets),
    token_logprobs = list(function(token) return token.logprob or json.null end),
    tokens = list(function(token) return token_text(tokenizer, token.id) end),
    top_logprobs = list(function(token) return top_of(tokenizer, token) end) }, LISTS)
end

-- ---- the prompt in an answer -------------------------------------------------------------------

-- What each prompt contributes: its text and its own log-probabilities, as far as wanted.
local function score_prompts(exchange, r)
  local asked = math.max(r.echo and r.logprobs or -1, r.prompt_logprobs or -1)
  local heads = {}
  for i, wanted in ipairs(r.wanted) do
    local ids, scores = wanted.prompt.ids, nil
    if asked >= 0 then
      scores = scoring.logprobs(exchange, ids, asked)
      if not scores then return nil end
    end
    heads[i] = { ids = ids, scores = scores }
  end
  return heads
end

-- fn(...), with idle() called meanwhile as often as that says.
local function beside(loop, idle, fn, ...)
  local is_done = false
  loop:spawn(function()
    while idle and not is_done do loop:sleep(idle()) end
  end)
  local results = table.pack(pcall(fn, ...))
  is_done = true
  if not results[1] then error(results[2], 0) end
  return table.unpack(results, 2, results.n)
end

-- The first piece of a choice: text and lists of the prompt.
local function head_piece(r, head, state)
  local model = r.server.model
  if not r.echo then return "", nil end
  local text = model:decode(head.ids)
  if not r.logprobs then return text, nil end
  local listed = { scores = head.scores, n_scores = #head.ids, offsets = {}, entries = {} }
  for i, id in ipairs(head.ids) do listed.offsets[i] = next_offset(state, id) end
  return text, listed
end

local function prompt_lists(r, head)
  if not r.prompt_logprobs then return nil end
  return openai.list_prompt(r.server.model.tokenizer, head.scores, r.prompt_logprobs)
end

-- ---- replies -----------------------------------------------------------------------------------

local CHOICE <const> = { "index", "text", "logprobs", "finish_reason", "stop_reason",
  "prompt_logprobs", "token_ids", "prompt_token_ids" }

local function choice_of(r, index, given)
  given.index, given.logprobs = index, given.logprobs and lists_of(r, given.logprobs) or json.null
  given.finish_reason = given.finish_reason or json.null
  return json.object(given, CHOICE)
end

local function reply_of(r, choices)
  return json.object({ id = r.id, object = "text_completion", created = r.created,
    model = r.model, choices = json.array(choices) },
    { "id", "object", "created", "model", "choices", "usage" })
end

-- Hands out pieces { text =, logprobs =, ... } of every choice, the last one with a reason. True
-- unless the client has gone.
local function each_piece(exchange, run, r, idle, emit)
  local heads = beside(exchange.server.loop, idle, score_prompts, exchange, r)
  if not heads then return false end
  local tokenizer, states = r.server.model.tokenizer, {}
  for i, head in ipairs(heads) do
    for k = 1, r.n do
      local index = (i - 1) * r.n + k - 1
      states[index] = new_state(tokenizer)
      local text, lists = exchange.server.loop:gently(head_piece, r, head, states[index])
      emit(index, { text = text, logprobs = lists, prompt_logprobs = prompt_lists(r, head),
        prompt_token_ids = r.token_ids and json.array(head.ids) or nil,
        finish_reason = not r.generates and "length" or nil })
    end
  end
  return run:answer(exchange, function(choice, part)
    if part.reason == "error" then return end
    local state = states[choice.index]
    local piece = { text = part.text or "",
      logprobs = r.logprobs and list_tokens(state, choice:take_entries()) or nil }
    if part.kind == "end" then
      piece.finish_reason, piece.stop_reason = part.reason, part.stop_reason
      piece.token_ids = r.token_ids and json.array(choice.ids) or nil
    end
    emit(choice.index, piece)
  end, idle)
end

local function merge(whole, piece)
  whole.text = whole.text .. piece.text
  for name, value in pairs(piece) do
    if name == "logprobs" and whole.logprobs then
      for _, list in ipairs { "offsets", "entries" } do
        local to, from = whole.logprobs[list], value[list]
        table.move(from, 1, #from, #to + 1, to)
      end
    elseif name ~= "text" then
      whole[name] = value
    end
  end
end

local function reply_whole(exchange, run, r)
  local wholes, choices = {}, {}
  local is_read = each_piece(exchange, run, r, nil, function(index, piece)
    wholes[index] = wholes[index] or { text = "" }
    merge(wholes[index], piece)
  end)
  if not is_read then return end
  for index = 0, #r.wanted * r.n - 1 do
    choices[index + 1] = choice_of(r, index, wholes[index])
  end
  local reply = reply_of(r, choices)
  reply.usage = openai.usage(run:usage())
  exchange:reply_longer(reply)
end

local function is_empty(piece)
  return piece.text == "" and not piece.finish_reason and not piece.prompt_logprobs
    and not piece.prompt_token_ids and not (piece.logprobs and #piece.logprobs.offsets > 0)
end

local function reply_stream(exchange, run, r)
  local stream = exchange:events()
  local is_read = each_piece(exchange, run, r, function()
    return stream:beat(exchange.server.heartbeat, function()
      stream:data(reply_of(r, { choice_of(r, 0, { text = "" }) }))
    end)
  end, function(index, piece)
    if is_empty(piece) then return end
    local is_listed = piece.logprobs or piece.prompt_logprobs
    local chunk = reply_of(r, { choice_of(r, index, piece) })
    if r.continuous then chunk.usage = openai.usage(run:usage()) end
    if is_listed then stream:longer(chunk) else stream:data(chunk) end
  end)
  if is_read then openai.end_stream(stream, run, r.include_usage and reply_of(r, {}) or nil) end
end

---@param exchange moonlet.server.Exchange
function completions.post(exchange)
  local r = read(exchange)
  local reply = r.stream and reply_stream or reply_whole
  reply(exchange, generation.serve(exchange, r.wanted), r)
end

return completions
