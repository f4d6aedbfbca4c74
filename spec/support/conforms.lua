-- Whether values and replies are as an OpenAPI document says. Objects whose members are listed have
-- no others.

local json = require "moonlet.json"
local validate = require "moonlet.validate"

local conforms = {}

-- The words of schemas that moonlet.server.openapi uses, any other raises; those whose values are
-- schemas, or tables of them.
local WORDS <const> = {}
for word in ([[$ref additionalProperties anyOf const contentEncoding description enum format items
  maxItems maximum minItems minLength minimum properties required type]]):gmatch("%S+") do
  WORDS[word] = true
end
local SCHEMA <const> = { additionalProperties = true, items = true }
local SCHEMAS <const> = { anyOf = true, properties = true }

local prepared

local function all_prepared(schemas, is_closed)
  local made = {}
  for key, schema in pairs(schemas) do made[key] = prepared(schema, is_closed) end
  return made
end

-- A schema as validate has it; closed, it lets no members pass that are not listed.
function prepared(schema, is_closed)
  if type(schema) ~= "table" then return schema end
  local made = {}
  for word, value in pairs(schema) do
    assert(WORDS[word], "a schema says " .. word)
    made[word] = SCHEMA[word] and prepared(value, is_closed)
      or SCHEMAS[word] and all_prepared(value, is_closed) or value
  end
  if is_closed and made.properties and made.additionalProperties == nil then
    made.additionalProperties = false
  end
  return made
end

local components = { [true] = setmetatable({}, { __mode = "k" }),
  [false] = setmetatable({}, { __mode = "k" }) } -- by document

-- A value, as moonlet.json has them, against a schema of an OpenAPI document. With `is_closed`
-- objects have no members but those that are described.
function conforms.check(value, schema, document, is_closed)
  is_closed = is_closed or false
  local known = components[is_closed]
  known[document] = known[document]
    or { schemas = all_prepared(document.components.schemas, is_closed) }
  local whole = prepared(schema, is_closed)
  whole.components = known[document]
  local ok, why = validate.check(value, whole, "value")
  return ok or false, why
end

-- ---- replies -----------------------------------------------------------------------------------

-- The path of the document that stands for a request's.
local function describe(document, path)
  path = path:match("^[^?#]*")
  for pattern, item in pairs(document.paths) do
    local lua = "^" .. pattern:gsub("[%-%.]", "%%%0"):gsub("{%w+}", ".+") .. "$"
    if path:find(lua) then return item end
  end
end

local function check_events(events, media, document)
  local data = media.schema.properties.data.contentSchema
  for _, event in ipairs(events) do
    if type(event) ~= "table" or not event.comment then
      local ok, why = conforms.check(event, data, document, true)
      if not ok then return false, why .. " in " .. json.encode(event) end
    end
  end
  return true
end

-- A reply as spec.support.client has it, against an OpenAPI document. What leads nowhere is not
-- described.
function conforms.reply(document, method, path, reply, events_of)
  local item = describe(document, path)
  local operation = item and item[method == "HEAD" and "get" or method:lower()]
  if not operation or reply.status == nil then return true end
  local response = operation.responses[tostring(reply.status)]
  if not response then return false, ("status %d is not described"):format(reply.status) end
  for name in pairs(response.headers or {}) do
    if not reply.fields[name:lower()] then return false, "no header " .. name end
  end
  if method == "HEAD" then return true end
  local kind = (reply.fields["content-type"] or ""):match("^[^;]*")
  if not response.content then return reply.body == "", "a body" end
  local media = response.content[kind]
  if not media then return false, ("Content-Type %s is not described"):format(kind) end
  if kind == "text/event-stream" then return check_events(events_of(reply), media, document) end
  if kind ~= "application/json" then return true end
  return conforms.check(assert(reply.json), media.schema, document, true)
end

return conforms
