-- A raw HTTP client: bash's /dev/tcp in a process of its own, so that every byte on the wire is
-- known and the server can run in this one.

local conforms = require "spec.support.conforms"
local json = require "moonlet.json"
local openapi = require "moonlet.server.openapi"

local client = {}

local function read_file(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read("a")
  file:close()
  return text
end

local function write_file(path, text)
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
end

-- A bash script in the background. `input` is a file beside it, which it finds as "$0.in".
local function spawn(script, input, seconds)
  local path = os.tmpname()
  write_file(path .. ".sh", script .. "\n")
  write_file(path .. ".sh.in", input or "")
  os.execute(("(timeout %d bash %s.sh >%s.out 2>&1; echo done >%s.end) &"):format(seconds, path,
    path, path))
  local self = {}
  function self.is_done()
    local f = io.open(path .. ".end", "rb")
    if f then f:close() end
    return f ~= nil
  end
  function self.output()
    local text = read_file(path .. ".out")
    for _, suffix in ipairs { "", ".sh", ".sh.in", ".out", ".end" } do os.remove(path .. suffix) end
    return text
  end
  return self
end

-- One that has the connection as descriptor 3.
function client.start(port, script, input)
  return spawn(("exec 3<>/dev/tcp/127.0.0.1/%d || exit 1\n%s"):format(port, script), input, 20)
end

client.READ_ALL = "cat <&3"

-- ---- requests ----------------------------------------------------------------------------------

-- The bytes of a request; a table is sent as JSON.
function client.bytes(method, path, body, fields)
  local all = { Host = "localhost", Connection = "close" }
  if type(body) == "table" then
    body, all["Content-Type"] = json.encode(body), "application/json"
  end
  if body then all["Content-Length"] = tostring(#body) end
  for name, value in pairs(fields or {}) do all[name] = value end
  local lines = { ("%s %s HTTP/1.1"):format(method, path) }
  for name, value in pairs(all) do
    if value then lines[#lines + 1] = name .. ": " .. value end
  end
  return table.concat(lines, "\r\n") .. "\r\n\r\n" .. (body or "")
end

local function unchunk(text)
  local pieces, at = {}, 1
  while true do
    local digits, from = text:match("^(%x+)\r\n()", at)
    local n = digits and tonumber(digits, 16)
    if not n or n == 0 then break end
    pieces[#pieces + 1] = text:sub(from, from + n - 1)
    at = from + n + 2
  end
  return table.concat(pieces)
end

-- The bytes of a reply taken apart: status, fields (lower-case names), body, and JSON in it.
function client.parse(text)
  local head, body = text:match("^(.-\r\n)\r\n(.*)$")
  if not head then return { text = text } end
  local reply = { status = tonumber(head:match("^HTTP/1%.1 (%d+)")), fields = {}, body = body,
    head = head }
  for name, value in head:gmatch("\n([%w-]+): ([^\r]*)") do reply.fields[name:lower()] = value end
  if reply.fields["transfer-encoding"] == "chunked" then reply.body = unchunk(body) end
  if (reply.fields["content-type"] or ""):find("json") then reply.json = json.decode(reply.body) end
  return reply
end

-- The values of a stream of events; comments count as { comment = text }. An event that has a name
-- says it twice.
function client.events(reply)
  local list = {}
  for block in reply.body:gmatch("(.-)\n\n") do
    local name, named = block:match("^event: ([%w._]+)\ndata: (.*)$")
    local data, comment = named or block:match("^data: (.*)$"), block:match("^: (.*)$")
    if comment then
      list[#list + 1] = { comment = comment }
    elseif data == "[DONE]" then
      list[#list + 1] = "[DONE]"
    else
      local value = assert(json.decode((assert(data, block))))
      assert(not name or name == value.type, block)
      list[#list + 1] = value
    end
  end
  return list
end

-- ---- against a server in this process ----------------------------------------------------------

-- Lets a server run until all clients have ended.
function client.wait(server, clients)
  server.loop:spawn(function()
    for _, c in ipairs(clients) do
      while not c.is_done() do server.loop:sleep(0.005) end
    end
    server.loop:stop()
  end)
  assert(server.loop:run())
end

-- What a client of another make prints while the server runs.
function client.command(server, command)
  local c = spawn(command, nil, 600)
  client.wait(server, { c })
  return c.output()
end

-- Begins a request.
function client.send(server, method, path, body, fields)
  return client.start(server.port, 'cat "$0.in" >&3; ' .. client.READ_ALL,
    client.bytes(method, path, body, fields))
end

-- Every reply is as the server describes itself.
local function checked(server, method, path, reply)
  local document = openapi.document(server.limits, server.has_keys())
  local ok, why = conforms.reply(document, method, path, reply, client.events)
  if not ok then
    error(("%s %s: %s\n%s"):format(method, path, why, reply.body), 0)
  end
  return reply
end

-- Sends requests { method, path, body, fields }, all at once, and takes the replies apart.
function client.all(server, requests)
  local script, path = {}, os.tmpname()
  for i, r in ipairs(requests) do
    write_file(path .. ".in" .. i, client.bytes(table.unpack(r, 1, 4)))
    script[i] = ("(exec 3<>/dev/tcp/127.0.0.1/%d; cat %s.in%d >&3; cat <&3 >%s.out%d) &"):format(
      server.port, path, i, path, i)
  end
  script[#script + 1] = "wait"
  local c = client.start(server.port, table.concat(script, "\n"))
  client.wait(server, { c })
  c.output()
  local replies = {}
  for i, r in ipairs(requests) do
    replies[i] = checked(server, r[1], r[2], client.parse(read_file(path .. ".out" .. i)))
    os.remove(path .. ".in" .. i)
    os.remove(path .. ".out" .. i)
  end
  os.remove(path)
  return replies
end

function client.ask(server, method, path, ...)
  local c = client.send(server, method, path, ...)
  client.wait(server, { c })
  return checked(server, method, path, client.parse(c.output()))
end

-- Two functions that post to a path of the server at hand what body_of makes of more fields: one
-- for the reply, one for the events of a stream, and its reply.
function client.dialect(path, body_of, server_at_hand)
  local function ask(more, fields)
    return client.ask(server_at_hand(), "POST", path, body_of(more), fields)
  end
  local function stream(more)
    more = more or {}
    more.stream = true
    local reply = ask(more)
    assert(reply.status == 200, reply.body)
    return client.events(reply), reply
  end
  return ask, stream
end

return client
