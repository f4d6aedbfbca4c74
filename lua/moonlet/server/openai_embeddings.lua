--- /v1/embeddings: the last hidden state, averaged over the tokens of each input.

local base64 = require "moonlet.base64"
local fields = require "moonlet.server.fields"
local generation = require "moonlet.server.generation"
local json = require "moonlet.json"
local openai = require "moonlet.server.openai"
local scoring = require "moonlet.server.scoring"

local embeddings = {}

local function encode(values, format)
  if format == "float" then return json.array(values) end
  local packed = {}
  for i, x in ipairs(values) do packed[i] = string.pack("<f", x) end
  return base64.encode(table.concat(packed))
end

-- The first values, which are no fewer than there are.
local function cut(values, n)
  return n and table.move(values, 1, n, 1, {}) or values
end

---@param exchange moonlet.server.Exchange
function embeddings.post(exchange)
  local server = exchange.server
  local f = fields.of(exchange:body())
  local inputs = openai.prompts(f, "input", server)
  local format = f:string("encoding_format") or "float"
  if format ~= "float" and format ~= "base64" then
    f:refuse("encoding_format", "float or base64 expected")
  end
  local dimensions, model_name = f:integer("dimensions", 1, server.dimensions),
    generation.model_name(f, server)
  local list, n_tokens = json.array {}, 0
  for _, input in ipairs(inputs) do generation.check_room(server, input, "input") end
  exchange:is_read()
  for i, input in ipairs(inputs) do
    local values = scoring.mean(exchange, input.ids)
    if not values then return end
    n_tokens = n_tokens + input.n
    local embedding = server.loop:gently(encode, cut(values, dimensions), format)
    list[i] = json.object({ object = "embedding", index = i - 1, embedding = embedding },
      { "object", "index", "embedding" })
  end
  exchange:reply(200, json.object({ object = "list", data = list,
    model = model_name,
    usage = { prompt_tokens = n_tokens, total_tokens = n_tokens } },
    { "object", "data", "model", "usage" }))
end

return embeddings
