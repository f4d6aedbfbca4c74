--- Tools for agents that every coding agent has: read, write, edit, list, grep, bash.
---
---   local list = assert(moonlet.tools({ "read", "grep" }, "src"))
---
--- File tools and grep stay inside the directory; links and ".." that lead out of it are refused.
--- bash only begins there: what a command does is the user's to permit (see ask).

local files = require "moonlet.tools.files"
local options = require "moonlet.options"
local place = require "moonlet.tools.place"
local shell = require "moonlet.tools.shell"

local MAKERS <const> = { read = files.read, write = files.write, edit = files.edit,
  list = files.list, grep = shell.grep, bash = shell.bash }

---@class moonlet.Tool
---@field name string
---@field description? string
---@field parameters? table JSON schema of an object
---@field run fun(arguments: table, ctx: moonlet.ToolContext): any, string? result: a text, or a
---  value that becomes JSON; or nil and what went wrong; nil alone is told as "ok"
---@field ask? boolean the agent's `ask` decides on every call
---@field parallel? boolean false: runs alone, in the order of the calls
---@field seconds? number|false until it is given up; false: it has its own limit

local tools = {}

---Names of all built-in tools.
tools.names = { "read", "write", "edit", "list", "grep", "bash" }

---@param names string[]
---@param dir? string the directory that they work in (".")
---@return moonlet.Tool[]? list, string? message, string? code
function tools.list(names, dir)
  if type(names) ~= "table" then options.misuse("list of tool names expected") end
  local where, message, code = place.open(dir or ".")
  if not where then return nil, message, code end
  local list = {}
  for i, name in ipairs(names) do
    local make = MAKERS[name]
    if not make then
      return nil, ("there is no tool '%s'; built in are %s"):format(tostring(name),
        table.concat(tools.names, ", ")), "unsupported"
    end
    list[i] = make(where)
  end
  return list
end

return setmetatable(tools, { __call = function(_, ...) return tools.list(...) end })
