--- Tools that read, write, edit and list files of a directory.

local json = require "moonlet.json"
local sys = require "moonlet.sys"

local files = {}

local MAX_FILE_BYTES <const> = 64 << 20 -- that is read at all
local MAX_LINES <const>, MAX_BYTES <const> = 2000, 48 << 10 -- that one call shows
local PROBED_BYTES <const> = 8192
local MAX_PLACES <const> = 10 -- that edit names
local MAX_ENTRIES <const> = 1000
local MAX_LEVELS <const> = 16

local function text(description) return json.object({ type = "string",
  description = description }, { "type", "description" }) end
local function integer(description) return json.object({ type = "integer", minimum = 1,
  description = description }, { "type", "minimum", "description" }) end

-- A schema whose members are { name, schema }; the first n_required have to be there.
local function parameters(members, n_required)
  local properties, names, required = {}, {}, json.array {}
  for i, member in ipairs(members) do
    properties[member[1]], names[i] = member[2], member[1]
    if i <= n_required then required[i] = member[1] end
  end
  return json.object({ type = "object", properties = json.object(properties, names),
    required = required }, { "type", "properties", "required" })
end

files.text, files.integer, files.parameters = text, integer, parameters

-- What a tool answers, as the model is told it.
local function told(place, answer, message, code)
  if answer == nil then message = place:retold(message) end
  return answer, message, code
end

-- A path argument as the file that it names.
local function find_file(place, given)
  local path, message, code = place:resolve(given)
  if not path then return nil, message, code end
  local kind = sys.file_kind(path)
  if not kind then return nil, given .. ": no such file", "io" end
  if kind == "directory" then return nil, given .. ": a directory, not a file", "io" end
  local size
  size, message, code = sys.file_info(path)
  if not size then return nil, message, code end
  if size > MAX_FILE_BYTES then
    return nil, ("%s: %d bytes are too much for this tool; take a part of it with another")
      :format(given, size), "limit"
  end
  return path
end

local function read_text(place, given)
  local path, message, code = find_file(place, given)
  if not path then return nil, message, code end
  local bytes
  bytes, message, code = sys.read_file(path)
  if not bytes then return nil, message, code end
  if bytes:sub(1, PROBED_BYTES):find("\0", 1, true) or not utf8.len(bytes) then
    return nil, ("%s: a binary file of %d bytes, not text in UTF-8"):format(given, #bytes),
      "unsupported"
  end
  return bytes, path
end

-- ---- read --------------------------------------------------------------------------------------

-- Lines from `first` on, as many as fit: the text, the last one's number, and whether that one was
-- cut.
local function take_lines(bytes, first, count)
  local kept, size, number, last, cut = {}, 0, 0, first - 1, false
  for line in bytes:gmatch("[^\n]*\n?") do
    if line == "" then break end
    number = number + 1
    if number >= first and #kept < count and not cut then
      if size + #line > MAX_BYTES then
        if #kept > 0 then
          count = #kept
        else
          cut = true
          line = line:sub(1, (utf8.offset(line, 0, MAX_BYTES + 1) or 1) - 1)
        end
      end
      if #kept < count then
        kept[#kept + 1], size, last = line, size + #line, number
      end
    end
  end
  return table.concat(kept), last, number, cut
end

local function read(place, given)
  local bytes, message, code = read_text(place, given.path)
  if not bytes then return nil, message, code end
  if bytes == "" then return "[the file is empty]" end
  local first = given.offset or 1
  local shown, last, n, cut = take_lines(bytes, first, math.min(given.limit or MAX_LINES,
    MAX_LINES))
  if first > n then
    return nil, ("%s has %d lines; offset %d is behind its end"):format(given.path, n, first),
      "range"
  end
  if cut then
    return ("%s\n[line %d is longer than %d bytes and was cut here]"):format(shown, first,
      MAX_BYTES)
  end
  if last == n then return shown end
  return ("%s[lines %d to %d of %d; go on with offset %d]"):format(shown, first, last, n, last + 1)
end

function files.read(place)
  return { name = "read", description = "Read a file.",
    parameters = parameters({
      { "path", text "path of the file" },
      { "offset", integer "line to begin with" },
      { "limit", integer "most lines to read" },
    }, 1),
    run = function(given) return told(place, read(place, given)) end }
end

-- ---- write -------------------------------------------------------------------------------------

local function write(place, given)
  local path, message, code = place:resolve(given.path)
  if not path then return nil, message, code end
  if sys.file_kind(path) == "directory" then
    return nil, given.path .. ": a directory, not a file", "io"
  end
  local ok
  ok, message, code = place:make_parents(path)
  if not ok then return nil, message, code end
  ok, message, code = sys.write_file(path, given.content)
  if not ok then return nil, message, code end
  return ("Successfully wrote %d bytes to %s"):format(#given.content, given.path)
end

function files.write(place)
  return { name = "write", description = "Write a file.", ask = true, parallel = false,
    parameters = parameters({
      { "path", text "path of the file" },
      { "content", text "the text to write" },
    }, 2),
    run = function(given) return told(place, write(place, given)) end }
end

-- ---- edit --------------------------------------------------------------------------------------

-- How often a text occurs, where first, and the numbers of the lines in which the first few begin.
local function find_all(bytes, wanted)
  local n, first, lines, at, number, counted = 0, nil, {}, 1, 1, 1
  while true do
    local found = bytes:find(wanted, at, true)
    if not found then return n, first, lines end
    n, first = n + 1, first or found
    if n <= MAX_PLACES then
      local _, breaks = bytes:sub(counted, found - 1):gsub("\n", "")
      number, counted = number + breaks, found
      lines[n] = number
    end
    at = found + 1
  end
end

local function with_crlf(lines)
  return (lines:gsub("\r?\n", "\r\n"))
end

local function edit(place, given)
  local bytes, path, code = read_text(place, given.path)
  if not bytes then return nil, path, code end
  local old, new = given.old_text, given.new_text
  if old == "" then return nil, "old_text is empty", "range" end
  -- Models write line feeds; the file keeps its own line ends.
  local n, at, lines = find_all(bytes, old)
  if n == 0 and bytes:find("\r\n", 1, true) and not old:find("\r", 1, true) then
    old, new = with_crlf(old), with_crlf(new)
    n, at, lines = find_all(bytes, old)
  elseif not old:find("\n", 1, true) and bytes:match("\r?\n") == "\r\n" then
    new = with_crlf(new)
  end
  if n == 0 then
    return nil, given.path .. ": old_text was not found; it must match exactly, blanks included",
      "range"
  elseif n > 1 then
    return nil, ("%s: old_text was found %d times (lines %s); give more of its surroundings")
      :format(given.path, n, table.concat(lines, ", ")), "range"
  end
  local ok, message
  ok, message, code = sys.write_file(path, bytes:sub(1, at - 1) .. new .. bytes:sub(at + #old))
  if not ok then return nil, message, code end
  return "ok"
end

function files.edit(place)
  return { name = "edit", description = "Replace text in a file.", ask = true, parallel = false,
    parameters = parameters({
      { "path", text "path of the file" },
      { "old_text", text "the text to find" },
      { "new_text", text "the text to put there" },
    }, 3),
    run = function(given) return told(place, edit(place, given)) end }
end

-- ---- list --------------------------------------------------------------------------------------

-- Adds what is in a directory, sorted, to `out`; links are shown, not followed.
local function walk(place, dir, levels, out)
  local entries, message, code = sys.list_dir(dir)
  if not entries then return nil, message, code end
  local names = {}
  for name in pairs(entries) do names[#names + 1] = name end
  table.sort(names)
  for _, name in ipairs(names) do
    local path = (dir == "/" and "" or dir) .. "/" .. name
    local kind = sys.file_kind(path)
    out.n = out.n + 1
    if out.n <= MAX_ENTRIES then
      out[out.n] = place:shown(path) .. (kind == "directory" and "/" or kind == "link" and "@"
        or "")
    end
    if kind == "directory" and levels > 1 then
      -- One that cannot be read is shown like an empty one.
      walk(place, path, levels - 1, out)
    end
  end
  return true
end

local function list(place, given)
  local dir = given.path or "."
  local path, message, code = place:resolve(dir)
  if not path then return nil, message, code end
  if sys.file_kind(path) ~= "directory" then
    return nil, dir .. ": no such directory", "io"
  end
  local out = { n = 0 }
  local ok
  ok, message, code = walk(place, path, math.min(given.depth or 1, MAX_LEVELS), out)
  if not ok then return nil, message, code end
  if out.n == 0 then return "[the directory is empty]" end
  if out.n > MAX_ENTRIES then
    out[MAX_ENTRIES + 1] = ("[%d of %d entries; list a directory below]"):format(MAX_ENTRIES,
      out.n)
  end
  return table.concat(out, "\n")
end

function files.list(place)
  return { name = "list", description = "List a directory.",
    parameters = parameters({
      { "path", text "path of the directory" },
      { "depth", integer "levels to list, 1 without what is below" },
    }, 0),
    run = function(given) return told(place, list(place, given)) end }
end

return files
