--- The directory that tools work in, and may not leave.

local sys = require "moonlet.sys"

local place = {}

local MAX_BYTES <const> = 4096 -- the system's own limit, PATH_MAX

---@class moonlet.tools.Place
---@field root string absolute, without links
local Place = {}
Place.__index = Place

---@param dir string
---@return moonlet.tools.Place? place, string? message, string? code
function place.open(dir)
  local root, message, code = sys.real_path(dir)
  if not root then return nil, message, code end
  if sys.file_kind(root) ~= "directory" then return nil, dir .. ": not a directory", "io" end
  return setmetatable({ root = root }, Place)
end

local function is_inside(root, path)
  return path == root or path:sub(1, #root + 1) == root .. "/" or root == "/"
end

-- The last part of a path and what is in front of it.
local function split(path)
  local parent, name = path:match("^(.*)/([^/]*)$")
  return parent == "" and "/" or parent, name
end

-- What speaks against a path that leads to `real`, which need not be there: devices and FIFOs would
-- be waited for, and only a directory's name ends like one.
local function fault(given, real)
  local kind = sys.file_kind(real)
  if kind and kind ~= "file" and kind ~= "directory" then
    return given .. ": neither a file nor a directory"
  end
  if given:find("/%.?$") and kind ~= "directory" then return given .. ": no such directory" end
end

---Where a path leads: absolute, without links, inside the root; to a file, a directory, or nothing
---yet. What is not there is judged by the nearest directory that is.
---@param given string absolute, or from the root
---@return string? path, string? message, string? code
function Place:resolve(given)
  if given:find("\0", 1, true) then return nil, "a path has no NUL bytes", "range" end
  if #given > MAX_BYTES then
    return nil, ("a path has at most %d bytes"):format(MAX_BYTES), "range"
  end
  local full = given:sub(1, 1) == "/" and given or self.root .. "/" .. given
  local existing, missing = full:gsub("/+$", ""), ""
  local real
  while true do
    real = sys.real_path(existing == "" and "/" or existing)
    if real then break end
    if sys.file_kind(existing) == "link" then
      return nil, given .. ": a link to something that is not there", "io"
    end
    local parent, name = split(existing)
    if name == ".." then return nil, given .. ": no such directory", "io" end
    if name ~= "." and name ~= "" then missing = "/" .. name .. missing end
    existing = parent
  end
  local there = real
  real = (real == "/" and missing ~= "" and "" or real) .. missing
  if not is_inside(self.root, real) then
    return nil, ("%s is outside the working directory; paths inside it are allowed")
      :format(given), "unsupported"
  end
  if missing ~= "" and sys.file_kind(there) ~= "directory" then
    return nil, ("%s: %s is no directory"):format(given, self:shown(there)), "io"
  end
  local message = fault(given, real)
  if message then return nil, message, "io" end
  return real
end

---@param path string as resolve() gives it
---@return string from the root, "." for it
function Place:shown(path)
  if path == self.root then return "." end
  return path:sub(#self.root + (self.root == "/" and 1 or 2))
end

---What the system says of a path, which it begins with, for who knows paths from the root.
---@param message string
---@return string
function Place:retold(message)
  local prefix = self.root == "/" and "/" or self.root .. "/"
  return message:sub(1, #prefix) == prefix and message:sub(#prefix + 1) or message
end

---Creates the directories above a path that are missing.
---@param path string as resolve() gives it
---@return true? ok, string? message, string? code
function Place:make_parents(path)
  local parent = split(path)
  if sys.file_kind(parent) then return true end
  local ok, message, code = self:make_parents(parent)
  if not ok then return nil, message, code end
  return sys.make_dir(parent)
end

return place
