-- outputs: where results may be written. Replacing an older result is what a caller asks for;
-- replacing what the work itself reads, or a part of a checkpoint, never is.

local core = require "moonlet.core"
local partial = require "moonlet.partial"

local outputs = {}

-- The directory without links, and the name in it.
local function place_of(path)
  local parent, name = path:match("^(.*)/([^/]+)$")
  if not parent then parent, name = ".", path end
  local real = core.real_path(parent == "" and "/" or parent)
  return real, name
end

---Whether what is at a path may be replaced: it is no file that is still needed.
---@param path string
---@param ... string?  files that are read, directories of checkpoints; nil for what is not given
---@return true? ok, string? message, string? code
function outputs.spare(path, ...)
  local target, message, code = core.file_target(path)
  if not target then return nil, message, code end
  for i = 1, select("#", ...) do
    local input = (select(i, ...))
    local real = input and core.real_path(input)
    for _, at in ipairs { path, target } do
      local parent, name = place_of(at)
      if real and real == parent and partial.is_part(name) then
        return nil, ("%s: would be a part of the checkpoint %s; choose another place"):format(path,
          input), "io"
      end
    end
    if real and real == outputs.real(target) then
      return nil, ("%s: is read; choose another place"):format(path), "io"
    end
  end
  return true
end

---Whether a file can be written at a path, too: known before hours of work.
---@param path string
---@param ... string?  as outputs.spare
---@return true? ok, string? message, string? code
function outputs.check(path, ...)
  local ok, message, code = outputs.spare(path, ...)
  if not ok then return nil, message, code end
  ok, message, code = core.check_writable(outputs.directory(path))
  if not ok then return nil, message, code end
  return core.check_free(path)
end

---The directory that a file of this path is in.
---@param path string
---@return string
function outputs.directory(path) return partial.place_of_file(path).parent end

---The path without links.
---@param path string
---@return string? path  nil where nothing can be written
function outputs.real(path)
  local parent, name = place_of(core.file_target(path) or path)
  return parent and (parent == "/" and "" or parent) .. "/" .. name
end

-- Whether a path is that of what an output grows in, or lies in it.
local function within_partial(path, out)
  local real, place = outputs.real(path), outputs.real(out)
  if not real or not place then real, place = path, out end
  place = place .. ".partial"
  return real == place or real:sub(1, #place + 1) == place .. "/"
end

-- Whether two paths are of one file, there or not.
local function same(a, b)
  return a == b or outputs.real(a) ~= nil and outputs.real(a) == outputs.real(b)
end

---Why two outputs of one run cannot be written, if they cannot.
---@param a string?
---@param b string?
---@param names string  what the user calls them: "options 'a' and 'b'"
---@return string? message
function outputs.clash(a, b, names)
  if not a or not b then return nil end
  if same(a, b) then return names .. " are one file" end
  if within_partial(a, b) or within_partial(b, a) then
    return ("one of %s is or lies in the other's .partial"):format(names)
  end
end

return outputs
