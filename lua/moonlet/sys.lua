--- The process around a script: interrupts, terminals, installed files.
local core = require "moonlet.core"

local sys = {
  catch_interrupt = core.catch_interrupt,
  interrupted = core.interrupted,
  isatty = core.isatty,
  seconds = core.seconds,
  wait_input = core.wait_input,
}

local function exists(path)
  local file = io.open(path, "rb")
  if file then file:close() end
  return file ~= nil
end

---Directories that hold moonlet's data files, in a source tree or installed.
---@param name string "recipes" or "demo-model"
---@return string? dir
function sys.data_dir(name)
  local init = package.searchpath("moonlet", package.path)
  local home = init and init:match("^(.*)/init%.lua$")
  if not home then return nil end
  local tree = home:match("^(.+)/lua/moonlet$") or home .. "/../.."
  local probe = name == "recipes" and "unsloth.lua" or "config.json"
  for _, dir in ipairs { tree .. "/", tree .. "/examples/", home .. "/" } do
    if exists(dir .. name .. "/" .. probe) then return dir .. name end
  end
  return nil
end

return sys
