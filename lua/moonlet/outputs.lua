-- outputs: where results may be written. Replacing an older result is what a caller asks for;
-- replacing what the work itself reads, or a part of a checkpoint, never is.

local core = require "moonlet.core"
local partial = require "moonlet.partial"

local outputs = {}

-- The directory without links, and the name in it: renaming replaces a link, not what it names.
local function place_of(path)
  local parent, name = path:match("^(.*)/([^/]+)$")
  if not parent then parent, name = ".", path end
  local real, message, code = core.real_path(parent == "" and "/" or parent)
  if not real then return nil, message, code end
  return real, name
end

-- Renaming replaces whatever is there, and a pipe or a terminal is more than a name.
local function replaceable(path)
  if path:find "/$" or core.file_kind(path .. "/") == "directory" then
    return nil, path .. ": Is a directory", "io"
  end
  local kind = core.file_kind(path)
  if kind == "link" then
    local real = core.real_path(path)
    kind = real and core.file_kind(real) or "other"
  end
  if kind ~= nil and kind ~= "file" then
    return nil, path .. ": is not a regular file; results are written to files only", "io"
  end
  return true
end

---Whether what is at a path may be replaced: it is no file that is still needed.
---@param path string
---@param ... string?  files that are read, directories of checkpoints; nil for what is not given
---@return true? ok, string? message, string? code
function outputs.spare(path, ...)
  local ok, message, code = replaceable(path)
  if not ok then return nil, message, code end
  local parent, name, failed = place_of(path)
  if not parent then return nil, ("%s: %s"):format(path, name), failed end
  for i = 1, select("#", ...) do
    local input = (select(i, ...))
    local real = input and core.real_path(input)
    if real == parent and partial.is_part(name) then
      return nil, ("%s: would be a part of the checkpoint %s; choose another place"):format(path,
        input), "io"
    end
    if real then
      local of, own = place_of(input)
      if real == parent .. "/" .. name or of == parent and own == name then
        return nil, ("%s: is read; choose another place"):format(path), "io"
      end
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

---The path without links, but for a last one: those are replaced.
---@param path string
---@return string? path  nil where there is no such directory
function outputs.real(path)
  local parent, name = place_of(path)
  return parent and parent .. "/" .. name
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
