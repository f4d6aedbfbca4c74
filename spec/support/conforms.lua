-- Whether values are as JSON schemas say: the words that moonlet.server.openapi uses, any other
-- word raises. Objects whose members are listed have no others.

local json = require "moonlet.json"

local conforms = {}

local WORDS <const> = {}
for word in ([[$ref additionalProperties anyOf const contentEncoding description enum format items
  maxItems maximum minItems minLength minimum properties required type]]):gmatch("%S+") do
  WORDS[word] = true
end

local function type_of(value)
  if value == json.null then return "null" end
  if type(value) == "boolean" or type(value) == "string" then return type(value) end
  if type(value) == "number" then return math.tointeger(value) and "integer" or "number" end
  return json.is_array(value) and "array" or "object"
end

local function is_of_type(value, name)
  local kind = type_of(value)
  return kind == name or kind == "integer" and name == "number"
end

local check

local function fail(place, what, ...)
  return false, (place == "" and "value" or place) .. ": " .. what:format(...)
end

local function check_type(value, schema, place)
  local names = type(schema.type) == "string" and { schema.type } or schema.type
  for _, name in ipairs(names) do
    if is_of_type(value, name) then return true end
  end
  return fail(place, "%s instead of %s", type_of(value), table.concat(names, " or "))
end

local function is_among(value, list)
  for _, other in ipairs(list) do
    if other == value then return true end
  end
  return false
end

local function check_any(value, schema, place, o)
  local reasons = {}
  for i, branch in ipairs(schema.anyOf) do
    local ok, why = check(value, branch, place, o)
    if ok then return true end
    reasons[i] = why
  end
  return fail(place, "fits nothing: (%s)", table.concat(reasons, "; "))
end

local function check_number(value, schema, place)
  if schema.minimum and value < schema.minimum then return fail(place, "%s is too small", value) end
  if schema.maximum and value > schema.maximum then return fail(place, "%s is too large", value) end
  return true
end

local function check_array(value, schema, place, o)
  if #value < (schema.minItems or 0) or #value > (schema.maxItems or math.huge) then
    return fail(place, "%d items", #value)
  end
  for i, item in ipairs(schema.items and value or {}) do
    local ok, why = check(item, schema.items, ("%s[%d]"):format(place, i - 1), o)
    if not ok then return false, why end
  end
  return true
end

local function check_object(value, schema, place, o)
  for _, name in ipairs(schema.required or {}) do
    if value[name] == nil then return fail(place, "no %s", name) end
  end
  for _, name in ipairs(json.keys(value)) do
    local member = schema.properties and schema.properties[name] or schema.additionalProperties
    if member then
      local ok, why = check(value[name], member, place .. "." .. name, o)
      if not ok then return false, why end
    elseif schema.properties and o.closed then
      return fail(place, "%s is not described", name)
    end
  end
  return true
end

function check(value, schema, place, o)
  for word in pairs(schema) do assert(WORDS[word], "a schema says " .. word) end
  if schema["$ref"] then
    local name = schema["$ref"]:match("^#/components/schemas/(.*)$")
    return check(value, assert(o.document.components.schemas[name], name), place, o)
  end
  if schema.anyOf then return check_any(value, schema, place, o) end
  if schema.type then
    local ok, why = check_type(value, schema, place)
    if not ok then return false, why end
  end
  if schema.enum and not is_among(value, schema.enum) then
    return fail(place, "%s is none of those there are", json.encode(value))
  end
  if schema.const ~= nil and value ~= schema.const then
    return fail(place, "%s expected", json.encode(schema.const))
  end
  local kind = type_of(value)
  if kind == "integer" or kind == "number" then return check_number(value, schema, place) end
  if kind == "array" then return check_array(value, schema, place, o) end
  if kind == "object" then return check_object(value, schema, place, o) end
  if kind == "string" and #value < (schema.minLength or 0) then return fail(place, "too short") end
  return true
end

-- A value, as moonlet.json has them, against a schema of an OpenAPI document. With `closed` objects
-- have no members but those that are described.
function conforms.check(value, schema, document, closed)
  return check(value, schema, "", { document = document, closed = closed })
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
