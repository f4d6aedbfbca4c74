-- Routes, refusals and who may ask, against a raw client.

local client = require "spec.support.client"
local http = require "moonlet.server.http"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local replay = require "moonlet.replay"
local served = require "spec.support.served"
local work = require "spec.support.work"
local workspace = require "spec.support.workspace"

local HELLO <const> = { messages = { { role = "user", content = "Hi" } } }

describe("server", function()
  local server
  after_each(function() server:close() end)

  local function status_of(...) return client.ask(server, ...).status end

  it("tells what it serves", function()
    server = served.replay({ "x" }, { name = "one" })
    local models = client.ask(server, "GET", "/v1/models")
    assert.equal(200, models.status)
    assert.equal("application/json", models.fields["content-type"])
    local entry = models.json.data[1]
    assert.same({ "list", "one", "model", 4096 },
      { models.json.object, entry.id, entry.object, entry.max_model_len })
    assert.same({ false, "one", "one", "model", "one" }, { models.json.has_more,
      models.json.first_id, models.json.last_id, entry.type, entry.display_name }) -- Anthropic's
    assert.matches("^%d+%-%d%d%-%d%dT%d%d:%d%d:%d%dZ$", entry.created_at)
    assert.equal("one", client.ask(server, "GET", "/v1/models/one").json.id)
    local unknown = client.ask(server, "GET", "/v1/models/two")
    assert.same({ 404, "model_not_found" }, { unknown.status, unknown.json.error.code })
    local health = client.ask(server, "GET", "/health")
    assert.same({ 200, "" }, { health.status, health.body })
    assert.equal(moonlet._VERSION, client.ask(server, "GET", "/version").json.version)
  end)

  it("has a page that runs its own script and style and loads nothing else", function()
    server = served.replay({ "x" }, { api_keys = { "k" } })
    local reply = client.ask(server, "GET", "/")
    assert.equal(200, reply.status)
    assert.equal("text/html; charset=utf-8", reply.fields["content-type"])
    local policy = reply.fields["content-security-policy"]
    assert.matches("^default%-src 'none';", policy)
    assert.is_nil(policy:find("unsafe", 1, true))
    for _, element in ipairs { "script", "style" } do
      local text = reply.body:match("<" .. element .. ">(.-)</" .. element .. ">")
      local path = os.tmpname()
      local file = assert(io.open(path, "wb"))
      file:write(text)
      file:close()
      local pipe = assert(io.popen(([[bash -c 'printf "$(sha256sum %s | cut -c-64 | ]]
        .. [[sed "s/../\\\\x&/g")" | base64']]):format(path)))
      assert.equal(pipe:read("l"), policy:match(element .. "%-src 'sha256%-([^']+)'"))
      pipe:close()
      os.remove(path)
    end
    assert.is_nil(reply.body:find("https?://[^w]")) -- http://www.w3.org names SVG
    assert.is_nil(reply.body:find("innerHTML", 1, true))
  end)

  it("answers what it does not have in OpenAI's shape", function()
    server = served.replay({ "x" }, { limits = { body_bytes = 2 << 20 } })
    local rows = {
      { 404, "not_found_error", "GET", "/v1/nothing" },
      { 404, "not_found_error", "GET", "/v1/models/" .. ("x"):rep(50) },
      { 405, "invalid_request_error", "GET", "/v1/chat/completions" },
      { 405, "invalid_request_error", "POST", "/v1/models", {} },
      { 405, "invalid_request_error", "DELETE", "/v1/models" },
      { 405, "invalid_request_error", "PUT", "/v1/models", {} },
      { 405, "invalid_request_error", "PATCH", "/v1/completions", {} },
      { 405, "invalid_request_error", "TRACE", "/" },
      { 413, "invalid_request_error", "POST", "/v1/chat/completions", { a = ("x"):rep(2 << 20) } },
      { 415, "invalid_request_error", "POST", "/v1/chat/completions", "a=b",
        { ["Content-Type"] = "application/x-www-form-urlencoded" } },
      { 415, "invalid_request_error", "POST", "/v1/chat/completions", HELLO,
        { ["Content-Encoding"] = "gzip" } },
      { 400, "invalid_request_error", "POST", "/v1/chat/completions", '{"messages": [' },
      { 400, "invalid_request_error", "POST", "/v1/chat/completions", "[]" },
      { 400, "invalid_request_error", "POST", "/v1/chat/completions", "" },
      { 400, "invalid_request_error", "POST", "/v1/chat/completions", '{"a":"\xff"}' },
      { 400, "invalid_request_error", "POST", "/v1/chat/completions",
        '{"a":' .. ("["):rep(200) .. ("]"):rep(200) .. "}" },
      { 400, "invalid_request_error", "POST", "/v1/chat/completions", '{"policy": 1e999}' },
      { 400, "invalid_request_error", "POST", "/v1/responses", '{"tools": [{"a": -1e999}]}' },
      { 400, "invalid_request_error", "POST", "/v1/chat/completions",
        '{"a": [' .. ("1,"):rep(1 << 19) .. "1]}" },
    }
    for _, row in ipairs(rows) do
      local reply = client.ask(server, table.unpack(row, 3))
      assert.equal(row[1], reply.status, row[3] .. row[4])
      assert.equal(row[2], reply.json.error.type)
      assert.is_string(reply.json.error.message)
      assert.same({ "message", "type", "param", "code" },
        require("moonlet.json").keys(reply.json.error))
    end
    assert.equal("OPTIONS, POST",
      client.ask(server, "GET", "/v1/chat/completions").fields.allow)
  end)

  it("refuses in every dialect what it cannot make a model keep to", function()
    server = served.replay { "x" }
    local refused = { structured_outputs = { json = {} }, chat_template = "x",
      response_format = { type = "json_object" } }
    for path, body in pairs { ["/v1/chat/completions"] = HELLO,
      ["/v1/messages"] = { messages = HELLO.messages, max_tokens = 5 },
      ["/v1/completions"] = { prompt = "x" }, ["/v1/responses"] = { input = "x" } } do
      for name, value in pairs(refused) do
        local given = { [name] = value }
        for key, of_all in pairs(body) do given[key] = of_all end
        local reply = client.ask(server, "POST", path, given)
        assert.equal(400, reply.status, path)
        assert.matches("^" .. name .. ": ", reply.json.error.message)
      end
      assert.equal(200, client.ask(server, "POST", path, body,
        { ["Content-Encoding"] = "identity" }).status)
    end
  end)

  it("sends no heartbeats without pauses", function()
    server = served.replay { "x" }
    for _, seconds in ipairs { 0, -1, 0 / 0 } do
      assert.error_matches(function() served.replay({ "x" }, { heartbeat = seconds }) end,
        "option 'heartbeat': seconds above 0 expected")
    end
  end)

  it("says where a script is none", function()
    server = served.replay { "x" }
    for line, problem in pairs { ['{"text": "a", "delay": 3}'] = "unknown field 'delay'",
      ['{"text": "a", "prefill_ms": 1e999}'] = "prefill_ms: a finite number from 0 expected" } do
      local path = os.tmpname()
      local file = assert(io.open(path, "w"))
      file:write('{"text": "b"}\n', line)
      file:close()
      assert.same({ nil, path .. ":2: " .. problem, "format" }, { replay.read(path) })
      os.remove(path)
    end
  end)

  it("has errors of the loop named by their status", function()
    server = served.replay { "x" }
    local before, after, after_failure = http.error_form()
    for end_of, kind in pairs { [after] = "invalid_request_error",
      [after_failure] = "server_error" } do
      local body = json.decode(before .. "a sentence" .. end_of)
      assert.same({ "error", "a sentence", kind, json.null },
        { body.type, body.error.message, body.error.type, body.error.code })
    end
  end)

  it("answers HEAD with the head of GET", function()
    server = served.replay { "x" }
    local get, head = client.ask(server, "GET", "/v1/models"),
      client.ask(server, "HEAD", "/v1/models")
    assert.equal("", head.body)
    assert.equal(200, head.status)
    assert.equal(get.fields["content-length"], head.fields["content-length"])
  end)

  it("takes JSON without a Content-Type, and with a charset", function()
    server = served.replay { "x" }
    local body = '{"messages": [{"role": "user", "content": "Hi"}]}'
    for _, kind in ipairs { false, "application/json; charset=utf-8", "Application/JSON",
      "application/vnd.api+json" } do
      local reply = client.ask(server, "POST", "/v1/chat/completions", body,
        { ["Content-Type"] = kind })
      assert.equal(200, reply.status)
    end
  end)

  it("answers what docs/server.md shows for curl", function()
    server = served.replay { "Paris." }
    local file <close> = assert(io.open("docs/server.md"))
    local command = file:read("a"):match("```sh\n(curl .-)```")
    local script = workspace.new { ["ask.sh"] = [[
      curl() { printf '%s\0' "$@"; }
      ]] .. command }
    local words, fields, url, sent = script.run("bash ask.sh"), {}, nil, nil
    script.remove()
    local word = words:gmatch("(%Z*)\0")
    for option in word do
      if option:find("^http") then
        url = option
      elseif option == "-H" then
        local name, value = word():match("^(.-): (.*)$")
        fields[name] = value
      elseif option == "-d" then
        sent = word()
      else
        assert.equal("-s", option)
      end
    end
    local host, path = url:match("^http://([^/]+)(.*)$")
    fields.Host = host
    assert.equal("application/json", fields["Content-Type"]) -- curl has another of its own
    local reply = client.ask(server, "POST", path, sent, fields)
    assert.same({ 200, "Paris." }, { reply.status, reply.json.choices[1].message.content })
  end)

  it("answers the preflight of pages on this machine", function()
    server = served.replay { "x" }
    local reply = client.ask(server, "OPTIONS", "/v1/chat/completions", nil, {
      Origin = "http://localhost:3000", ["Access-Control-Request-Method"] = "POST",
      ["Access-Control-Request-Headers"] = "content-type, x-stainless-os" })
    assert.equal(204, reply.status)
    assert.equal("http://localhost:3000", reply.fields["access-control-allow-origin"])
    assert.equal("OPTIONS, POST", reply.fields["access-control-allow-methods"])
    assert.equal("content-type, x-stainless-os", reply.fields["access-control-allow-headers"])
    local post = client.ask(server, "POST", "/v1/chat/completions", HELLO,
      { Origin = "http://localhost:3000" })
    assert.equal("http://localhost:3000", post.fields["access-control-allow-origin"])
  end)

  it("is not to be called by pages of other sites, nor by names that point here", function()
    server = served.replay({ "x" }, { allow_hosts = { "Box.lan" } })
    for host, status in pairs {
      ["localhost:1234"] = 200, ["127.0.0.1"] = 200, ["[::1]:80"] = 200, ["a.localhost"] = 200,
      ["box.lan:8080"] = 200, ["LOCALHOST"] = 200,
      ["evil.example"] = 403, ["127.0.0.1.evil.example"] = 403, ["192.168.1.5"] = 403,
      ["localhost.evil.example:80"] = 403, ["127.0.0.1@evil.example"] = 403,
    } do
      assert.equal(status, status_of("GET", "/v1/models", nil, { Host = host }), host)
    end
    for origin, status in pairs {
      ["http://localhost:5173"] = 200, ["https://127.0.0.1"] = 200, ["http://box.lan"] = 200,
      ["http://evil.example"] = 403, ["null"] = 403, ["http://localhost.evil.example"] = 403,
      ["http://localhost:1@evil.example"] = 403,
    } do
      local reply = client.ask(server, "POST", "/v1/chat/completions", HELLO, { Origin = origin })
      assert.equal(status, reply.status, origin)
      if status == 403 then
        assert.equal("permission_error", reply.json.error.type)
        assert.is_nil(reply.fields["access-control-allow-origin"])
      end
    end
  end)

  it("may be called by programs whose origins are named, and says what permits others", function()
    server = served.replay({ "x" }, { allow_origins = { "app://obsidian.md",
      "https://a.example" } })
    for origin, expected in pairs {
      ["app://obsidian.md"] = 200, ["https://a.example"] = 200,
      ["https://a.example:81"] = "--allow-host", ["app://other"] = "--allow-origin",
      ["chrome-extension://abc"] = "--allow-origin", ["file://"] = "--allow-origin",
      ["null"] = "an API key", ["app://obsidian.md/x"] = "an API key",
    } do
      local reply = client.ask(server, "POST", "/v1/chat/completions", HELLO, { Origin = origin })
      if expected == 200 then
        assert.same({ 200, origin }, { reply.status, reply.fields["access-control-allow-origin"] })
      else
        assert.equal(403, reply.status)
        assert.matches(expected, reply.json.error.message, 1, true)
      end
    end
    for _, name in ipairs { "", "a@b" } do
      assert.error_matches(function() served.replay({ "x" }, { name = name }) end, "option 'name'")
    end
  end)

  it("takes targets that are whole URIs, by the rules for hosts", function()
    server = served.replay({ "x" })
    for target, status in pairs {
      ["http://127.0.0.1/v1/models"] = 200, ["HTTP://localhost:8080/v1/models?a=b"] = 200,
      ["http://127.0.0.1/v1/nothing"] = 404, ["http://localhost"] = 200,
      ["http://localhost?a"] = 200,
      ["http://evil.example/v1/models"] = 403, ["http://127.0.0.1@evil.example/v1/models"] = 403,
      ["http:///v1/models"] = 403,
    } do
      assert.equal(status, status_of("GET", target), target)
    end
    assert.equal(403, status_of("GET", "http://localhost/v1/models", nil,
      { Host = "evil.example" }))
  end)

  it("asks for a key when it has some", function()
    server = served.replay({ "x" }, { api_keys = { "first-key", "second" } })
    for _, row in ipairs {
      { 401, {} }, { 401, { Authorization = "Bearer none" } },
      { 401, { Authorization = "Bearer second-" } }, { 401, { Authorization = "second" } },
      { 401, { Authorization = "Bearer " } },
      { 200, { Authorization = "Bearer second" } }, { 200, { Authorization = "bearer first-key" } },
      { 200, { ["x-api-key"] = "second" } },
      { 200, { Authorization = "Bearer second", Origin = "https://chat.example",
        Host = "box.example" } },
    } do
      assert.equal(row[1], status_of("GET", "/v1/models", nil, row[2]))
    end
    for _, fields in ipairs { { Authorization = "Bearer " .. ("x"):rep(5000) },
      { ["x-api-key"] = ("x"):rep(5000) } } do
      assert.equal(401, status_of("GET", "/v1/models", nil, fields))
    end
    local reply = client.ask(server, "GET", "/v1/models")
    assert.same({ "authentication_error", "invalid_api_key", "Bearer" },
      { reply.json.error.type, reply.json.error.code, reply.fields["www-authenticate"] })
    assert.equal(200, status_of("GET", "/health"))
    assert.equal(204, status_of("OPTIONS", "/v1/models"))
    assert.equal(401, status_of("GET", "/v1/nothing"))
    assert.equal(404, status_of("GET", "/v1/nothing", nil, { ["X-Api-Key"] = "second" }))
  end)

  it("sends the queue's end away with a time to come back, and who has no key before", function()
    server = served.replay({ "never" }, { queue = 0, api_keys = { "k" } })
    for path, body in pairs { ["/v1/chat/completions"] = HELLO, ["/v1/messages"] = HELLO,
      ["/v1/completions"] = { prompt = "x" }, ["/v1/responses"] = { input = "x" } } do
      assert.equal(401, status_of("POST", path, body))
      local reply = client.ask(server, "POST", path, body, { Authorization = "Bearer k" })
      assert.same({ 429, "rate_limit_error" }, { reply.status, reply.json.error.type })
      assert.matches("^%d+$", reply.fields["retry-after"])
    end
  end)

  it("finds a key in time that grows with the header", function()
    server = served.replay({ "x" }, { api_keys = { "k" } })
    local function line(n) return "Bearer a" .. (" "):rep(n) .. "b" end
    for _, n in ipairs { 250, 15000 } do -- keys of both lengths, and headers beyond them
      assert.is_true(work.growth(n, line, function(text)
        assert.equal(401, status_of("GET", "/v1/models", nil, { Authorization = text }))
      end) < 6)
    end
  end)

  it("does not let others in by accident", function()
    server = served.replay({ "x" }, { host = "0.0.0.0", insecure_bind = true })
    assert.equal(200, status_of("GET", "/health", nil, { Host = "192.168.1.5:8080" }))
    assert.equal(403, status_of("GET", "/health", nil, { Host = "evil.example" }))
    local other, message, code = moonlet.serve { model = served.DIR, host = "0.0.0.0", port = 0 }
    assert.is_nil(other)
    assert.equal("unsupported", code)
    assert.matches("--insecure-bind", message, 1, true)
    other, message = moonlet.serve { model = served.DIR, host = "0.0.0.0", port = 0, api_keys = {} }
    assert.is_nil(other)
    assert.matches("--insecure-bind", message, 1, true)
    assert.error_matches(function() served.replay({ "x" }, { api_keys = { "" } }) end, "api_keys")
  end)

  it("says what is wrong with an address, a model, a script", function()
    server = served.replay { "x" }
    for _, o in ipairs {
      { model = served.DIR, port = server.port, replay = "README.md" },
      { model = "no-such-dir", port = 0 },
      { model = served.DIR, port = 0, replay = "no-such-file" },
      { model = served.DIR, port = 0, replay = "README.md" },
    } do
      local other, message, code = moonlet.serve(o)
      assert.is_nil(other)
      assert.is_string(message)
      assert.is_string(code)
    end
    assert.error(function() moonlet.serve { model = served.DIR, prot = 1 } end)
    assert.error(function() moonlet.serve {} end)
  end)

  it("answers 500 when it fails itself, logs why and goes on", function()
    local logged
    server = served.replay({ "x" }, { log = function(text) logged = text end })
    server.prompts.make = function() error("broken on purpose") end
    local reply = client.ask(server, "POST", "/v1/chat/completions", HELLO)
    assert.same({ 500, "server_error" }, { reply.status, reply.json.error.type })
    assert.is_nil(reply.body:find("on purpose"))
    assert.matches("broken on purpose", logged)
    assert.equal(200, status_of("GET", "/health"))
  end)

  it("answers nobody who has left while a text was tokenized", function()
    local n_submitted, statuses = 0, {}
    server = served.replay({ "x" }, {
      on_served = function(exchange) statuses[#statuses + 1] = exchange.status or "left" end })
    local encode, submit = server.encode, server.engine.submit
    function server.engine.submit(...)
      n_submitted = n_submitted + 1
      return submit(...)
    end
    server.engine.is_scripted = false
    function server.model.scoring()
      n_submitted = n_submitted + 1
      error("nobody wants it")
    end
    function server.encode(...)
      local request = next(server.exchanges)
      while not request:is_over() do server.loop:sleep(0.001) end
      return encode(...)
    end
    for path, given in pairs { ["/v1/completions"] = { prompt = "x", stream = true },
      ["/v1/embeddings"] = { input = "x" } } do
      local n_before = #statuses
      local c = client.start(server.port, 'cat "$0.in" >&3', client.bytes("POST", path, given))
      server.loop:spawn(function()
        while #statuses == n_before do server.loop:sleep(0.001) end
        server.loop:stop()
      end)
      assert(server.loop:run())
      client.wait(server, { c })
      c.output()
    end
    assert.same({ 0, { "left", "left" } }, { n_submitted, statuses })
  end)

  it("keeps no connection while it shuts down, whatever is asked on it", function()
    server = served.replay { "x" }
    server.is_closing = true
    for _, row in ipairs { { "POST", "/v1/chat/completions", HELLO, 503 },
      { "GET", "/v1/models", nil, 200 }, { "GET", "/v1/nothing", nil, 404 } } do
      for _, wish in ipairs { "keep-alive", "close" } do
        local reply = client.ask(server, row[1], row[2], row[3], { Connection = wish })
        assert.equal(row[4], reply.status)
        assert.equal("close", reply.fields.connection)
        local _, n = reply.head:gsub("\nConnection:", "")
        assert.equal(1, n)
      end
    end
  end)

  it("sends the last of an answer when it is told to end at that moment", function()
    server = served.replay { "x" }
    server.on_served = function() server:shutdown() end
    local c = client.send(server, "POST", "/v1/chat/completions",
      { messages = HELLO.messages, stream = true })
    assert(server:run())
    while not c.is_done() do os.execute("sleep 0.02") end
    local events = client.events(client.parse(c.output()))
    assert.equal("[DONE]", events[#events])
  end)

  it("reads keys from a file", function()
    server = served.replay { "x" }
    local path = os.tmpname()
    local file = assert(io.open(path, "w"))
    file:write("# keys\none\n\n  two \r\n")
    file:close()
    assert.same({ "one", "two" }, http.read_keys(path))
    assert(io.open(path, "w")):close()
    local keys, _, code = http.read_keys(path)
    assert.same({ nil, "format" }, { keys, code })
    file = assert(io.open(path, "w"))
    file:write(("k"):rep(5000))
    file:close()
    keys, _, code = http.read_keys(path)
    os.remove(path)
    assert.same({ nil, "format" }, { keys, code })
    assert.error(function() http.key_check { ("k"):rep(5000) } end)
  end)
end)
