--- The fields that say how tokens are chosen, as moonlet.server.sampling reads them, and
--- those that are refused.

local json = require "moonlet.json"
local shape = require "moonlet.server.openapi.shape"

local number = { type = "number" }

local function between(from, to, description)
  return { type = "number", minimum = from, maximum = to, description = description }
end

---@return table<string, table> properties
return function()
  local refused = { enum = json.array { "" },
    description = "Needs constrained decoding, which there is not yet." }
  return {
    temperature = between(0, 1e6, "0 takes the likeliest token. Where a field of sampling is "
      .. "absent, generation_config.json decides."),
    top_p = between(0, 1),
    top_k = { type = "integer", minimum = -1, description = "0 and -1: off" },
    min_p = between(0, 1),
    typical_p = between(0, 1),
    repetition_penalty = between(1e-6, 1e6),
    presence_penalty = between(-1e6, 1e6),
    frequency_penalty = between(-1e6, 1e6),
    logit_bias = { type = "object", additionalProperties = number,
      description = "by token id" },
    seed = { type = "integer", format = "int64" },
    stop = shape.any({ type = "string" },
      shape.list({ type = "string" }, { maxItems = 64 })),
    include_stop_str_in_output = { type = "boolean" },
    stop_token_ids = shape.list({ type = "integer", minimum = 0 }),
    ignore_eos = { type = "boolean" },
    min_tokens = { type = "integer", minimum = 0 },
    skip_special_tokens = { type = "boolean" },
    response_format = { type = "object", required = json.array { "type" }, properties =
      json.object { type = shape.one_of("text", "json_object", "json_schema"),
      json_schema = shape.nullable { type = "object" } } },
    structured_outputs = refused,
    guided_json = refused,
    guided_regex = refused,
    guided_choice = refused,
    guided_grammar = refused,
    grammar = refused,
    json_schema = refused,
    chat_template = { type = "string" },
  }
end
