--- Words for writing JSON schemas: what replies and requests consist of.

local json = require "moonlet.json"

local shape = {}

---@param name string of a schema under components
---@return table
function shape.ref(name)
  return { ["$ref"] = "#/components/schemas/" .. name }
end

---The same schema, and null.
---@param schema table
---@return table
function shape.nullable(schema)
  if schema["$ref"] or schema.anyOf then
    return { anyOf = json.array { schema, { type = "null" } } }
  end
  local made = {}
  for key, value in pairs(schema) do made[key] = value end
  if type(made.type) == "table" or made.type == "null" then return schema end -- it is already
  if made.const then made.enum, made.const = { made.const }, nil end
  if made.type then made.type = json.array { made.type, "null" } end
  if made.enum then
    made.enum = table.move(made.enum, 1, #made.enum, 1, json.array {})
    made.enum[#made.enum + 1] = json.null
  end
  return made
end

---A list.
---@param items table
---@param more table? minItems and the like
---@return table
function shape.list(items, more)
  local made = { type = "array", items = items }
  for key, value in pairs(more or {}) do made[key] = value end
  return made
end

---@param ... table
---@return table
function shape.any(...)
  return { anyOf = json.array { ... } }
end

---@param ... string
---@return table
function shape.one_of(...)
  return { type = "string", enum = json.array { ... } }
end

---Always this string.
---@param text string
---@return table
function shape.always(text)
  return { type = "string", const = text }
end

---An object of a reply: everything is there but what `optional` names.
---@param properties table<string, table>
---@param optional string[]?
---@return table
function shape.object(properties, optional)
  local required, left_out = json.array {}, {}
  for _, name in ipairs(optional or {}) do left_out[name] = true end
  for name in pairs(properties) do
    if not left_out[name] then required[#required + 1] = name end
  end
  table.sort(required)
  return { type = "object", properties = json.object(properties), required = required }
end

---An object of a request: null is the same as absent for all that need not be there.
---@param properties table<string, table>
---@param required string[]?
---@return table
function shape.request(properties, required)
  local needed = {}
  for _, name in ipairs(required or {}) do needed[name] = true end
  local all = {}
  for name, schema in pairs(properties) do
    all[name] = needed[name] and schema or shape.nullable(schema)
  end
  return { type = "object", properties = json.object(all),
    required = required and json.array(required) or nil }
end

---Adds to a table of properties.
---@param to table<string, table>
---@param from table<string, table>
---@return table to
function shape.with(to, from)
  for name, schema in pairs(from) do to[name] = schema end
  return to
end

---Fields that other servers know and that have no effect here, whatever they hold.
---@param ... string
---@return table<string, table>
function shape.ignored(...)
  local made = {}
  for _, name in ipairs { ... } do made[name] = { description = "Has no effect." } end
  return made
end

-- ---- operations --------------------------------------------------------------------------------

local function json_content(schema)
  return { ["application/json"] = { schema = schema } }
end

---@param description string
---@param schema table of its JSON
---@param headers table<string, table>?
---@return table response
function shape.reply(description, schema, headers)
  return { description = description, content = json_content(schema), headers = headers }
end

---A reply that is streamed when the request says so. The schema of a stream is that of each event:
---OpenAPI 3.1 has no words for it, and this is what programs take it for.
---@param description string
---@param schema table of the whole reply
---@param event table of each event's data
---@return table response
function shape.streamed(description, schema, event)
  local made = shape.reply(description, schema)
  made.content["text/event-stream"] = { schema = { type = "object",
    description = "Each event of a stream; comments keep the connection alive.",
    required = json.array { "data" }, properties = json.object { event = { type = "string" },
      data = { type = "string", contentMediaType = "application/json", contentSchema = event,
        description = "JSON or, at the end of completions, [DONE]" } } } }
  return made
end

local text = { type = "string" }
local AUTHENTICATE <const> = { ["WWW-Authenticate"] = { schema = text } }
local ALLOW <const> = { Allow = { schema = text, description = "the methods there are" } }
local RETRY <const> = { ["Retry-After"] = { schema = { type = "integer", minimum = 1 },
  description = "seconds" } }

-- status -> what it means, header fields.
local FAILURES <const> = {
  [400] = { "The request cannot be served as it is; `param` names the field." },
  [401] = { "No valid API key.", AUTHENTICATE },
  [403] = { "The page or name that the request came by may not use this server." },
  [404] = { "There is no such thing." },
  [405] = { "The path does not take this method.", ALLOW },
  [413] = { "The body is too large." },
  [415] = { "The body is not JSON." },
  [422] = { "A hook or a policy of the server failed." },
  [429] = { "Too many requests wait.", RETRY },
  [500] = { "The server failed." },
  [503] = { "The server is shutting down, or its requests take too much memory." },
}

---@class moonlet.server.openapi.Operation
---@field id string
---@field summary string
---@field body table? schema of the request's
---@field reply table response with status 200
---@field fails integer[]? statuses besides those that everything may have
---@field error table? schema of errors; OpenAI's
---@field open boolean? needs no key
---@field parameters table[]?

---An OpenAPI operation.
---@param given moonlet.server.openapi.Operation
---@return table
function shape.operation(given)
  local responses = { ["200"] = given.reply }
  local function add(status)
    local row = FAILURES[status]
    responses[tostring(status)] = shape.reply(row[1], given.error or shape.ref "Error", row[2])
  end
  for _, status in ipairs { 403, 500 } do add(status) end
  if not given.open then add(401) end
  if given.body then
    for _, status in ipairs { 400, 413, 415, 422, 503 } do add(status) end
  end
  for _, status in ipairs(given.fails or {}) do add(status) end
  return { operationId = given.id, summary = given.summary, responses = json.object(responses),
    parameters = given.parameters and json.array(given.parameters) or nil,
    security = given.open and json.array { json.object {} } or nil,
    requestBody = given.body and { required = true, content = json_content(given.body) } or nil }
end

return shape
