--- What is served and how it goes: models, health, version, metrics.

local json = require "moonlet.json"
local refusal = require "moonlet.server.refusal"
local version = require "moonlet.version"

local info = {}

-- As OpenAI, vLLM and Anthropic have it: their fields do not contradict each other.
local function model_entry(server, name)
  return json.object({ id = name, object = "model", created = server.started,
    owned_by = "moonlet", root = server.model.dir, parent = json.null,
    max_model_len = server.engine.n_ctx, permission = json.array {}, type = "model",
    display_name = name, created_at = os.date("!%Y-%m-%dT%H:%M:%SZ", server.started) },
    { "id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission",
      "type", "display_name", "created_at" })
end

-- The model, and the model with each policy that a request may choose by its name.
local function model_names(server)
  local names = {}
  for policy in pairs(server.policies) do names[#names + 1] = server.name .. "@" .. policy end
  table.sort(names)
  table.insert(names, 1, server.name)
  return names
end

---@param exchange moonlet.server.Exchange
function info.models(exchange)
  local list, names = json.array {}, model_names(exchange.server)
  for i, name in ipairs(names) do list[i] = model_entry(exchange.server, name) end
  exchange:reply(200, json.object({ object = "list", data = list, has_more = false,
    first_id = names[1], last_id = names[#names] },
    { "object", "data", "has_more", "first_id", "last_id" }))
end

---@param exchange moonlet.server.Exchange
function info.one_model(exchange)
  local known = false
  for _, name in ipairs(model_names(exchange.server)) do known = known or name == exchange.rest end
  if not known then
    refusal.raise(404, ("there is no model '%s'"):format(exchange.rest),
      { param = "model", code = "model_not_found" })
  end
  exchange:reply(200, model_entry(exchange.server, exchange.rest))
end

---@param exchange moonlet.server.Exchange
function info.health(exchange)
  if exchange.server.is_closing then refusal.raise(503, "the server is shutting down") end
  exchange:reply(200, "")
end

---@param exchange moonlet.server.Exchange
function info.version(exchange)
  exchange:reply(200, { version = version })
end

---@param exchange moonlet.server.Exchange
function info.metrics(exchange)
  local server = exchange.server
  local engine, stats = server.engine, server.engine.stats
  local running, waiting = engine:load()
  local text = server.metrics:text(server.name, {
    gauges = {
      { "num_requests_running", "Requests that are worked on.", running },
      { "num_requests_waiting", "Requests that wait.", waiting },
      { "kv_cache_usage_perc", "Share of the cache's memory in use; 1 is all of it.",
        ("%.6f"):format(engine:cache_usage()) },
    },
    counters = {
      { "prefix_cache_queries_total", "Prompt tokens looked up.", stats.prompt_tokens },
      { "prefix_cache_hits_total", "Prompt tokens that needed no evaluation.",
        stats.cached_tokens },
      { "prompt_tokens_total", "Prompt tokens.", stats.prompt_tokens },
      { "generation_tokens_total", "Generated tokens.", stats.generated_tokens },
    },
  })
  exchange:reply(200, text, { ["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8" })
end

return info
