--- /tokenize and /detokenize, as vLLM has them.

local conversation = require "moonlet.server.conversation"
local fields = require "moonlet.server.fields"
local json = require "moonlet.json"
local openai = require "moonlet.server.openai"
local openai_chat = require "moonlet.server.openai_chat"
local refusal = require "moonlet.server.refusal"

local tokens = {}

-- The ids of a text, or of a rendered conversation.
local function ids_of(f, server)
  local messages = f:list("messages", server.limits.messages)
  if messages then
    return conversation.prompt(server, messages, openai_chat.template_variables(f, server),
      openai_chat.read_ending(f)).ids
  end
  local text = f:string("prompt")
  if not text then f:refuse("prompt", "a text, or messages, expected") end
  return refusal.check(server.encode(text))
end

local function texts_of(tokenizer, ids)
  local texts = json.array {}
  for i, id in ipairs(ids) do texts[i] = openai.token_text(tokenizer, id) end
  return texts
end

---@param exchange moonlet.server.Exchange
function tokens.tokenize(exchange)
  local server = exchange.server
  local f = fields.of(exchange:body())
  local ids = ids_of(f, server)
  local strings = f:boolean("return_token_strs")
    and server.loop:gently(texts_of, server.model.tokenizer, ids) or nil
  exchange:reply(200, json.object({ count = #ids, max_model_len = server.engine.n_ctx,
    tokens = json.array(ids), token_strs = strings },
    { "count", "max_model_len", "tokens", "token_strs" }))
end

---@param exchange moonlet.server.Exchange
function tokens.detokenize(exchange)
  local server = exchange.server
  local model = server.model
  local f = fields.of(exchange:body())
  local ids = server.loop:gently(f.ids, f, "tokens", model.tokenizer:n_vocab())
  if not ids then f:refuse("tokens", "a list of token ids expected") end
  exchange:reply(200, { prompt = refusal.check(model:decode(ids)) })
end

return tokens
