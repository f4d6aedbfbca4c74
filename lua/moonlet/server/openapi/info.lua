--- What tells of the server itself, as OpenAPI describes it.

local json = require "moonlet.json"
local shape = require "moonlet.server.openapi.shape"

local list, object, ref = shape.list, shape.object, shape.ref
local integer, text = { type = "integer" }, { type = "string" }

local schemas = {}

schemas.Error = object { error = object {
  message = text,
  type = shape.one_of("invalid_request_error", "authentication_error", "permission_error",
    "not_found_error", "rate_limit_error", "server_error"),
  param = shape.nullable { type = "string", description = "the field that is to blame" },
  code = shape.nullable(text),
} }

schemas.Model = object { id = text, object = shape.always "model", created = integer,
  owned_by = text, root = text, parent = { type = "null" }, max_model_len = integer,
  permission = list(json.object {}), type = shape.always "model", display_name = text,
  created_at = { type = "string", format = "date-time" } }

local function plain(description, kind, schema)
  return { description = description, content = { [kind] = { schema = schema or text } } }
end

local function get(given)
  return { get = shape.operation(given) }
end

return {
  schemas = schemas,
  paths = {
    ["/"] = get { id = "page", summary = "A page to chat with the model.", open = true,
      reply = plain("The page.", "text/html") },
    ["/health"] = get { id = "health", summary = "Whether requests are taken.", open = true,
      fails = { 503 }, reply = { description = "They are." } },
    ["/metrics"] = get { id = "metrics", summary = "Counts and times, for Prometheus.",
      reply = plain("In Prometheus's text format.", "text/plain") },
    ["/openapi.json"] = get { id = "openapi", summary = "This description.", open = true,
      reply = shape.reply("An OpenAPI 3.1 document.", { type = "object" }) },
    ["/v1/models"] = get { id = "models", summary = "The model that is served.",
      reply = shape.reply("It, and it with each policy.", object { object = shape.always "list",
        data = list(ref "Model"), has_more = { type = "boolean", const = false }, first_id = text,
        last_id = text }) },
    ["/v1/models/{id}"] = get { id = "model", summary = "The model of that name.",
      fails = { 404 }, reply = shape.reply("The model.", ref "Model"),
      parameters = { { name = "id", ["in"] = "path", required = true, schema = text } } },
    ["/version"] = get { id = "version", summary = "The server's version.",
      reply = shape.reply("The version.", object { version = text }) },
  },
}
