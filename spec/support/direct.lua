-- Requests to a server without sockets, thousands in a second: what the event loop would hand out.

local conforms = require "spec.support.conforms"
local client = require "spec.support.client"
local http = require "moonlet.server.http"
local json = require "moonlet.json"

local direct = {}

local Request = {}
Request.__index = Request

function Request:header(name) return self.given.fields[name:lower()] end
function Request:method() return self.given.method end
function Request:target() return self.given.target end
function Request:body() return self.given.body end
function Request:body_bytes() return #(self.given.body or "") end
function Request:drop_body() self.given.body = nil end
function Request.pending() return 0 end
function Request:is_over() return self.over or false end
function Request:finish() self.over = true end
function Request:close() self.over = true end

function Request:start(status, fields)
  self.reply_made = { status = status, fields = {}, body = "", largest = 0 }
  for name, value in pairs(fields) do self.reply_made.fields[name:lower()] = value end
end

function Request:write(text)
  self.reply_made.body = self.reply_made.body .. text
  self.reply_made.largest = math.max(self.reply_made.largest, #text)
  return true
end

function Request:reply(status, fields, text)
  self:start(status, fields)
  self:write(text)
  self:finish()
end

-- The reply to { method =, target =, body =, fields = by lower-case names }, as spec.support.client
-- has replies, with the size of the largest piece of its body; raises when it is not as the
-- document says. In a coroutine of the server's loop.
function direct.ask(server, document, given)
  local request = { given = setmetatable({ body = given.body }, { __index = given }) }
  setmetatable(request, Request)
  http.serve(server, request)
  local reply = assert(request.reply_made, "no reply")
  if (reply.fields["content-type"] or ""):find("json") and given.method ~= "HEAD" then
    reply.json = assert(json.decode(reply.body))
  end
  local path = given.target:match("^[^?#]*")
  local ok, why = conforms.reply(document, given.method, path, reply, client.events)
  assert(ok, tostring(why) .. "\n" .. reply.body)
  return reply
end

return direct
