-- /openapi.json describes the routes there are, and the fields as they are read. That replies are
-- as described is checked of every reply that specs of the server get (spec/support/client.lua).

local client = require "spec.support.client"
local conforms = require "spec.support.conforms"
local direct = require "spec.support.direct"
local fields = require "moonlet.server.fields"
local json = require "moonlet.json"
local served = require "spec.support.served"

local MESSAGES <const> = { { role = "user", content = "Hi" } }
local Fields <const> = getmetatable(fields.of({}))

-- A request that each endpoint reads to its end.
local REQUESTS <const> = {
  ["/v1/chat/completions"] = { { messages = MESSAGES, stream = true, stream_options = {} } },
  ["/v1/completions"] = { { prompt = "Hi" } },
  ["/v1/embeddings"] = { { input = "Hi" } },
  ["/v1/messages"] = { { messages = MESSAGES, stream = true } },
  ["/v1/messages/count_tokens"] = { { messages = MESSAGES } },
  ["/v1/responses"] = { { input = MESSAGES, stream = true } },
  ["/tokenize"] = { { prompt = "Hi" }, { messages = MESSAGES } },
  ["/detokenize"] = { { tokens = { 1 } } },
}

-- What a method of Fields takes, as a schema says it.
local READERS <const> = {
  string = function() return { "string" } end,
  boolean = function() return { "boolean" } end,
  number = function() return { "number" } end,
  object = function() return { "object" } end,
  array = function() return { "array" } end,
  list = function() return { "array" } end,
  ids = function() return { "array" } end,
  integer = function(min, max) return { "integer", min, max } end,
}

-- The fields that a request has read: name -> what Fields was asked for, or true.
local function read_fields(server, path, body)
  local read, wrapped = {}, {}
  for method, describe in pairs(READERS) do
    wrapped[method] = Fields[method]
    Fields[method] = function(self, name, ...)
      if self.path == "" then read[name] = describe(...) end
      return wrapped[method](self, name, ...)
    end
  end
  local get = Fields.get
  Fields.get = function(self, name)
    if self.path == "" then read[name] = read[name] or true end
    return get(self, name)
  end
  local ok, problem = pcall(client.ask, server, "POST", path, body)
  Fields.get = get
  for method, original in pairs(wrapped) do Fields[method] = original end
  assert(ok, problem)
  return read
end

local function deref(document, schema)
  local name = (schema["$ref"] or ""):match("([^/]+)$")
  return name and document.components.schemas[name] or schema
end

local function request_schema(document, path)
  return deref(document, document.paths[path].post.requestBody.content["application/json"].schema)
end

-- The first type that a field's schema names.
local function type_of(document, schema)
  schema = deref(document, schema)
  if schema.anyOf then return type_of(document, schema.anyOf[1]) end
  return type(schema.type) == "table" and schema.type[1] or schema.type
end

describe("/openapi.json", function()
  local server, document
  setup(function()
    server = served.replay { "one", "two" }
    document = client.ask(server, "GET", "/openapi.json").json
  end)
  teardown(function() server:close() end)

  it("has the routes that the server has", function()
    local described, routes = {}, {}
    for path, item in pairs(document.paths) do
      for method in pairs(item) do
        described[#described + 1] = method:upper() .. " " .. path:gsub("{%w+}", "*")
      end
    end
    for path, route in pairs(server.routes) do
      for _, method in ipairs { "GET", "POST" } do
        if route[method] then routes[#routes + 1] = method .. " " .. path end
      end
    end
    table.sort(described)
    table.sort(routes)
    assert.same(routes, described)
  end)

  it("consists of schemas", function()
    local KINDS <const> = { string = true, number = true, integer = true, boolean = true,
      array = true, object = true, null = true }
    local n = 0
    local function check(schema, place)
      n = n + 1
      if schema["$ref"] then
        local name = schema["$ref"]:match("^#/components/schemas/(.*)$")
        assert.is_table(document.components.schemas[name], place .. " " .. schema["$ref"])
      end
      local kinds = type(schema.type) == "string" and { schema.type } or schema.type or {}
      for _, kind in ipairs(kinds) do assert.is_true(KINDS[kind], place) end
      for name, child in pairs(schema.properties or {}) do check(child, place .. "." .. name) end
      for i, child in ipairs(schema.anyOf or {}) do check(child, place .. " " .. i) end
      for _, name in ipairs { "items", "additionalProperties" } do
        if type(schema[name]) == "table" then check(schema[name], place .. "[]") end
      end
    end
    for name, schema in pairs(document.components.schemas) do check(schema, name) end
    assert.is_true(n > 300)
  end)

  it("needs a key where the server does", function()
    local keyed <close> = served.replay({ "x" }, { api_keys = { "k" } })
    local guarded = client.ask(keyed, "GET", "/openapi.json").json
    assert.same({ 0, 2 }, { #document.security, #guarded.security })
    for path, route in pairs(keyed.routes) do
      local item = guarded.paths[(path:gsub("%*", "{id}"))]
      for _, operation in pairs(item) do
        assert.equal(route.open == true, operation.security ~= nil, path)
        assert.equal(route.open == true, operation.responses["401"] == nil, path)
      end
    end
  end)

  it("describes the fields that are read, as they are read", function()
    local paths = {}
    for path, item in pairs(document.paths) do
      if item.post then paths[#paths + 1] = path end
    end
    for _, path in ipairs(paths) do
      local read = {}
      for _, body in ipairs(assert(REQUESTS[path], path)) do
        for name, how in pairs(read_fields(server, path, body)) do
          if read[name] == nil or how ~= true then read[name] = how end
        end
      end
      local properties = request_schema(document, path).properties
      for name, how in pairs(read) do
        local schema = assert(properties[name], ("%s: %s is not described"):format(path, name))
        if how ~= true then
          assert.equal(how[1], type_of(document, schema), path .. " " .. name)
          if how[1] == "integer" then
            assert.same({ how[2], how[3] }, { schema.minimum, schema.maximum }, name)
          end
        end
      end
      for name, schema in pairs(properties) do
        local has_effect = schema.description ~= "Has no effect."
        assert.equal(has_effect, read[name] ~= nil, path .. " " .. name)
      end
    end
  end)

  -- Values of every kind, for any field.
  local VALUES <const> = { true, -1, 0, 1, 1.5, 21, 1e9, "", "x", "none", json.array {},
    json.array { "x" }, json.array { 1.5 }, json.array { json.null }, json.object {},
    json.object { type = "x" }, json.object { x = "y" } }
  -- Described, and not there yet or only together with others.
  local REFUSED <const> = {}
  for name in ([[response_format tool_choice continue_final_message
    add_generation_prompt chat_template suffix stream_options top_logprobs stop_token_ids
    logit_bias chat_template_kwargs tools messages prompt input tokens dimensions max_tokens
    prompt_logprobs previous_response_id conversation background]]):gmatch("%S+") do
    REFUSED[name] = true
  end

  -- Those that a schema forbids, and a few that it allows.
  local function some_of(schema)
    local some, n_allowed = {}, 0
    for _, value in ipairs(VALUES) do
      local allowed = conforms.check(value, schema, document)
      if allowed then n_allowed = n_allowed + 1 end
      if not allowed or n_allowed <= 3 then some[#some + 1] = value end
    end
    return some
  end

  local function replies_to(requests)
    local replies, problem = {}, nil
    server.loop:spawn(function()
      for i, request in ipairs(requests) do
        local ok, reply = pcall(direct.ask, server, document, request)
        if not ok then problem = problem or reply end
        replies[i] = reply
      end
      server.loop:stop()
    end)
    assert(server.loop:run())
    assert.is_nil(problem)
    return replies
  end

  it("forbids what is refused and allows what is taken", function()
    local n_allowed, n_forbidden, one_of_a_kind = 0, 0, {}
    for path in pairs(REQUESTS) do one_of_a_kind[request_schema(document, path)] = path end
    for _, path in pairs(one_of_a_kind) do
      local bodies, requests, rows = REQUESTS[path], {}, {}
      for name, schema in pairs(request_schema(document, path).properties) do
        for _, value in ipairs(some_of(schema)) do
          local body = json.object {}
          for key, given in pairs(bodies[#bodies]) do body[key] = given end
          if name ~= "stream" and name ~= "stream_options" then
            body.stream, body.stream_options = nil, nil
          end
          if name == "prompt" then body.messages = nil end -- which come first
          body[name] = value
          requests[#requests + 1] = { method = "POST", target = path,
            body = json.encode(body), fields = { host = "localhost" } }
          rows[#rows + 1] = { name, value, (conforms.check(value, schema, document)) }
        end
      end
      for i, reply in ipairs(replies_to(requests)) do
        local name, value, allowed = table.unpack(rows[i])
        local place = ("%s %s: %s"):format(path, name, json.encode(value))
        if not allowed then
          n_forbidden = n_forbidden + 1
          assert.equal(400, reply.status, place)
          -- Anthropic's errors say it in their message only.
          local param = reply.json.error.param or reply.json.error.message
          assert.equal(name, param ~= json.null and param:match("^[%w_]+"), place)
        elseif not REFUSED[name] and path ~= "/v1/embeddings" then
          n_allowed = n_allowed + 1
          assert.equal(200, reply.status, place .. reply.body)
        end
      end
    end
    assert.is_true(n_forbidden > 400 and n_allowed > 100, n_forbidden .. " " .. n_allowed)
  end)

  it("would notice a reply that is not as described", function()
    local reply = client.ask(server, "POST", "/v1/chat/completions", { messages = MESSAGES })
    local function check(change)
      local copy = { status = 200, fields = reply.fields, json = json.decode(reply.body) }
      change(copy)
      return (conforms.reply(document, "POST", "/v1/chat/completions", copy, client.events))
    end
    assert.is_true(check(function() end))
    for i, change in ipairs {
      function(r) r.status = 418 end,
      function(r) r.fields = { ["content-type"] = "text/plain" } end,
      function(r) r.json.choices = nil end,
      function(r) r.json.choices = json.array {} end,
      function(r) r.json.more = 1 end,
      function(r) r.json.object = "chat" end,
      function(r) r.json.created = "now" end,
      function(r) r.json.choices[1].finish_reason = "tired" end,
      function(r) r.json.choices[1].message.content = 1 end,
      function(r) r.json.usage.prompt_tokens = 1.5 end,
    } do
      assert.is_false(check(change), i)
    end
  end)
end)
