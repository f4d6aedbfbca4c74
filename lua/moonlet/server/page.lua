--- "/": a page to chat with the model, one file that needs nothing from elsewhere.

local base64 = require "moonlet.base64"
local sys = require "moonlet.sys"

local page = {}

-- What stands in the file's only element of that name, as a source of a content security policy:
-- nothing else may run or style, whatever a model writes.
local function source_of(html, element)
  local text = html:match(("<%s>(.-)</%s>"):format(element, element))
  local digest = sys.sha256(text):gsub("%x%x", function(hex)
    return string.char(tonumber(hex, 16))
  end)
  return "'sha256-" .. base64.encode(digest) .. "'"
end

local function fields_of(html)
  return {
    ["Content-Type"] = "text/html; charset=utf-8",
    ["Content-Security-Policy"] = ("default-src 'none'; script-src %s; style-src %s; "
      .. "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
      .. "frame-ancestors 'none'"):format(source_of(html, "script"), source_of(html, "style")),
    ["X-Content-Type-Options"] = "nosniff",
    ["Referrer-Policy"] = "no-referrer",
    ["Cache-Control"] = "no-cache",
  }
end

---Reads the file, which lies beside this one.
---@return { html: string, fields: table<string, string> }
function page.read()
  local path = assert(package.searchpath("moonlet.server.page", package.path))
  local html = assert(sys.read_file((path:gsub("%.lua$", ".html"))))
  return { html = html, fields = fields_of(html) }
end

---@param exchange moonlet.server.Exchange
function page.get(exchange)
  local server = exchange.server
  server.page = server.page or page.read()
  exchange:reply(200, server.page.html, server.page.fields)
end

return page
