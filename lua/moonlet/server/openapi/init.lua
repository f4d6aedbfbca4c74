--- /openapi.json: every request, reply and event of the server, described.
---
--- Fields are read where they are used, and described here; a spec sends what the descriptions
--- allow and forbid, and compares what the endpoints have read with what is described.

local chat = require "moonlet.server.openapi.chat"
local info = require "moonlet.server.openapi.info"
local json = require "moonlet.json"
local messages = require "moonlet.server.openapi.messages"
local responses = require "moonlet.server.openapi.responses"
local texts = require "moonlet.server.openapi.texts"
local version = require "moonlet.version"

local openapi = {}

local DESCRIPTION <const> = "OpenAI's API with vLLM's additions and Anthropic's, for one local "
  .. "model. Fields that are not described have no effect; null is the same as absent."

local SCHEMES <const> = {
  bearer = { type = "http", scheme = "bearer" },
  key = { type = "apiKey", ["in"] = "header", name = "X-Api-Key" },
}

-- Requests that choose tokens may name a policy, where the operator has any.
local function add_policies(schemas, policies)
  local names = json.array {}
  for name in pairs(policies) do names[#names + 1] = name end
  table.sort(names)
  for _, schema in pairs(#names > 0 and schemas or {}) do
    if schema.properties and schema.properties.temperature then
      schema.properties.policy = { type = "string", enum = names, description = "how tokens are "
        .. "chosen; what the request says itself comes first. Also behind @ in model." }
    end
  end
end

---@param limits table<string, integer> of the server
---@param has_keys boolean whether requests need a key
---@param policies table<string, any>? by name
---@return table document
function openapi.document(limits, has_keys, policies)
  local paths, schemas = {}, {}
  local conversations = chat(limits)
  for _, part in ipairs { info, conversations, messages(limits), responses(limits),
    texts(limits, conversations.variables(limits)) } do
    for path, item in pairs(part.paths) do paths[path] = item end
    for name, schema in pairs(part.schemas) do schemas[name] = schema end
  end
  add_policies(schemas, policies or {})
  local needed = { { bearer = json.array {} }, { key = json.array {} } }
  return json.object({
    openapi = "3.1.0",
    info = { title = "moonlet", version = version, description = DESCRIPTION },
    servers = json.array { { url = "/" } },
    security = json.array(has_keys and needed or {}),
    paths = json.object(paths),
    components = { schemas = json.object(schemas), securitySchemes = SCHEMES },
  }, { "openapi", "info", "servers", "security", "paths", "components" })
end

---@param exchange moonlet.server.Exchange
function openapi.get(exchange)
  local server = exchange.server
  exchange:reply(200, openapi.document(server.limits, server.has_keys(), server.policies))
end

return openapi
