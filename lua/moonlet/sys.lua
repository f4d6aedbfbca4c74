--- The process around a script: interrupts, terminals, files.
local core = require "moonlet.core"

local sys = {
  catch_interrupt = core.catch_interrupt,
  file_info = core.file_info,
  file_kind = core.file_kind,
  give_back_heap = core.give_back_heap,
  interrupted = core.interrupted,
  isatty = core.isatty,
  keep_little_heap = core.keep_little_heap,
  journal_create = core.journal_create,
  journal_open = core.journal_open,
  list_dir = core.list_dir,
  make_dir = core.make_dir,
  real_path = core.real_path,
  same_secret = core.same_secret,
  sha256 = core.sha256,
  seconds = core.seconds,
  wait_input = core.wait_input,
}

local ENOENT <const>, ENOTDIR <const> = 2, 20

-- Whether there is a pipe or a device at the path, which to open is to wait for it.
local function is_special(path)
  local real = core.real_path(path)
  return real ~= nil and core.file_kind(real) == "other"
end

---Whether there is anything of that name, readable or not.
---@param path string
---@return boolean
function sys.exists(path)
  if is_special(path) then return true end
  local file, _, errno = io.open(path, "rb")
  if file then file:close() end
  return file ~= nil or errno ~= ENOENT and errno ~= ENOTDIR
end

---The bytes of a file.
---@param path string
---@param max integer? bytes; devices may have no end
---@return string? bytes, string? message, string? code
function sys.read_file(path, max)
  local file, message = io.open(path, "rb")
  if not file then return nil, message, "io" end
  local bytes
  bytes, message = file:read(max and max + 1 or "a") -- a directory opens, and fails here
  file:close()
  if message then return nil, ("%s: %s"):format(path, message), "io" end
  if max and bytes and #bytes > max then
    return nil, ("%s: more than %d bytes"):format(path, max), "limit"
  end
  return bytes or ""
end

---The bytes of one of the small files that belong to something: of a checkpoint, a recipe. Nobody
---writes those into a pipe.
---@param path string
---@return string? bytes, string? message, string? code
function sys.read_own_file(path)
  if is_special(path) then return nil, path .. ": not a regular file", "io" end
  return sys.read_file(path)
end

---Replaces a file: written beside it, synced, renamed.
---@param path string
---@param bytes string
---@return true? ok, string? message, string? code
function sys.write_file(path, bytes)
  return core.file_write(path, bytes)
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
    if sys.exists(dir .. name .. "/" .. probe) then return dir .. name end
  end
  return nil
end

return sys
