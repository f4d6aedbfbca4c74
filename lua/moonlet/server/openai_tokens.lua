--- /tokenize and /detokenize, as vLLM has them. Texts of megabytes become answers many times as
--- long, which are written as they are made.

local conversation = require "moonlet.server.conversation"
local fields = require "moonlet.server.fields"
local json = require "moonlet.json"
local openai = require "moonlet.server.openai"
local openai_chat = require "moonlet.server.openai_chat"
local refusal = require "moonlet.server.refusal"

local tokens = {}

local PIECE <const> = 4096 -- ids that are written at once
local ID_BYTES <const> = 4 -- of a moonlet.Ids

-- The ids of a text, or of a rendered conversation.
local function ids_of(f, server)
  local messages = f:list("messages", server.limits.messages)
  if messages then
    return conversation.prompt(server, messages, openai_chat.template_variables(f, server),
      openai_chat.read_ending(f)).list
  end
  local text = f:string("prompt")
  if not text then f:refuse("prompt", "a text, or messages, expected") end
  return refusal.check(server.encode(text))
end

-- Sends the items of a list, made piece by piece: spell(ids) is their text.
local function send_list(send, ids, spell)
  for at = 1, #ids, PIECE do
    send((at > 1 and ", " or "") .. spell(ids:slice(at, at + PIECE - 1)))
  end
end

local function spell_ids(ids) return table.concat(ids, ", ") end

local function texts_spelled(tokenizer)
  return function(ids)
    local texts = json.array {}
    for i, id in ipairs(ids) do texts[i] = openai.token_text(tokenizer, id) end
    return json.encode(texts):sub(2, -2)
  end
end

---@param exchange moonlet.server.Exchange
function tokens.tokenize(exchange)
  local server = exchange.server
  local f = fields.of(exchange:body())
  local with_texts = f:boolean("return_token_strs")
  local ids <close> = ids_of(f, server)
  exchange:take(ID_BYTES * #ids)
  exchange:is_read()
  exchange:pour(function(send)
    send(('{"count": %d, "max_model_len": %d, "tokens": ['):format(#ids, server.engine.n_ctx))
    send_list(send, ids, spell_ids)
    if with_texts then
      send('], "token_strs": [')
      send_list(send, ids, texts_spelled(server.model.tokenizer))
    end
    send("]}")
  end)
end

-- Every id stands for something, as what is written cannot be taken back.
local function check_tokens(model, ids)
  for _, id in ipairs(ids) do
    if not model.tokenizer:token_bytes(id) then refusal.check(model:decode { id }) end
  end
end

---@param exchange moonlet.server.Exchange
function tokens.detokenize(exchange)
  local server = exchange.server
  local model = server.model
  local f = fields.of(exchange:body())
  local ids = server.loop:gently(f.ids, f, "tokens", model.tokenizer:n_vocab())
  if not ids then f:refuse("tokens", "a list of token ids expected") end
  server.loop:gently(check_tokens, model, ids)
  exchange:is_read()
  local stream <close> = model.tokenizer:stream()
  exchange:pour(function(send)
    local texts = {}
    local function send_texts()
      send(json.encode(table.concat(texts)):sub(2, -2))
      texts = {}
    end
    send('{"prompt": "')
    for i, id in ipairs(ids) do
      texts[#texts + 1] = stream:step(id)
      if i % PIECE == 0 then send_texts() end
    end
    texts[#texts + 1] = stream:finish()
    send_texts()
    send('"}')
  end)
end

return tokens
