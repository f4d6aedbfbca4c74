--- Sandboxes: code from others, in a Lua state of its own.
--
-- Inside are the pure parts of the standard library, nothing of the process, and limits on
-- instructions and memory: see csrc/lua/lsandbox.c, where they are kept. Values are copied in and
-- out (nil, booleans, numbers, strings, tables of them); functions come out as callable handles,
-- which can be passed back in.
--
--   local box <close> = assert(sandbox.open { instructions = 1000000 })
--   local chunk = assert(box:load("return function(x) return x + 1 end", "mine.lua"))
--   local ok, increment = chunk()
--   print(increment(1))  --> true  2
--   print(increment {})  --> nil  mine.lua:1: attempt to perform arithmetic on ...  format
local core = require "moonlet.core"
local sys = require "moonlet.sys"

local sandbox = {}

---@class moonlet.Sandbox
---@field load fun(self, text: string, name: string): function?, string?, string?  compiles a chunk;
---  what it gives, and every function that comes out, returns true and its results, or nil,
---  message, code ("limit" beyond a limit, "format" for an error, "cancelled" after Ctrl-C)
---@field close fun(self)

local texts = {}

---The text of a module of moonlet's, to be loaded inside.
---@param module string
---@return string
function sandbox.module_text(module)
  if not texts[module] then
    local path = assert(package.searchpath(module, package.path))
    texts[module] = assert(sys.read_file(path))
  end
  return texts[module]
end

---@param limits? { memory?: integer, block?: integer, instructions?: integer }  bytes in all (64
---  MiB) and in one piece (1 MiB), instructions of a call (a million)
---@return moonlet.Sandbox? box
---@return string? message
---@return string? code
function sandbox.open(limits)
  local box, message, code = core.sandbox_open(limits)
  if not box then return nil, message, code end
  local ok, chunk
  chunk, message, code = box:load(sandbox.module_text "moonlet.patterns", "patterns.lua")
  if chunk then ok, message, code = chunk() end
  if ok then return box end
  return nil, message, code
end

---Whether a value that came out of a sandbox is a function there.
---@param value any
---@return boolean
function sandbox.is_function(value)
  return core.sandbox_is_function(value)
end

return sandbox
