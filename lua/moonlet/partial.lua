-- partial: OUT.partial, where an output grows until it is complete and gets its name.
--
-- A journal in it says what is to be written (the head, its first line), how many tensors of each
-- file are on the disk, and what else took long to find out, so that another process can go on
-- where one was cut off. Whoever writes holds the journal's lock. Every line begins with a sum over
-- itself and those before it: a number that was damaged would give wrong weights silently.

local core = require "moonlet.core"
local json = require "moonlet.json"
local sys = require "moonlet.sys"

local partial = {}

local JOURNAL <const> = "journal"

-- Hexadecimal digits of a line's sum.
local SUM_DIGITS <const> = 16

---@class moonlet.Partial
---@field dir string
---@field head table   what the run that began it wrote down
local Partial = {}
Partial.__index = Partial

-- ---- the place ---------------------------------------------------------------------------------

local function parent_and_name(path)
  local parent, name = path:match("^(.*)/([^/]+)$")
  if not parent then return ".", path end
  return parent == "" and "/" or parent, name
end

---@class moonlet.Place
---@field out string      without a slash at its end
---@field parent string   directory of `out`
---@field owns fun(name: string): boolean?  whether a file in it is one of those that are written
---@field is_tree boolean?  OUT will be a directory
---@field dir string      OUT.partial; OUT itself where a run was cut off after it had renamed it

-- What is at OUT: whether a run was cut off after it had renamed it, or why OUT cannot be made. A
-- link is no directory to rename another onto: the system would say so when all work is done.
local function look_at(out)
  local inside, message, code = core.list_dir(out)
  local is_complete = inside and inside["moonlet.json"]
  if is_complete and inside[JOURNAL] then return true end
  if is_complete then
    return nil, out .. ": holds a complete checkpoint already", "io"
  elseif inside and next(inside) then
    return nil, out .. ": exists and is not empty", "io"
  elseif core.file_kind(out) == "link" then
    return nil, out .. ": is a link; name a new directory", "io"
  end
  if not inside and core.real_path(out) then return nil, message, code end
  return false
end

---Refuses an OUT that is in use, is the source or lies within it.
---@param source string
---@param out string
---@param owns fun(name: string): boolean?
---@return moonlet.Place? place
---@return string? message
---@return string? code
function partial.place(source, out, owns)
  out = #out > 1 and out:gsub("/+$", "") or out
  local renamed, message, code = look_at(out)
  if renamed == nil then return nil, message, code end
  local parent, name = parent_and_name(out)
  if name == "." or name == ".." then return nil, out .. ": name a new directory", "io" end
  local from, to
  from, message, code = core.real_path(source)
  if not from then return nil, message, code end
  to, message, code = core.real_path(parent)
  if not to then return nil, message, code end
  to = (to == "/" and "" or to) .. "/" .. name
  if (to .. "/"):sub(1, #from + 1) == from .. "/" then
    return nil, ("%s lies in the source %s"):format(out, source), "io"
  end
  return { out = out, parent = parent, dir = renamed and out or out .. ".partial", owns = owns,
    is_tree = true }
end

---The place of an output that is one file, which takes its name with Partial:deliver: where a link
---leads.
---@param path string
---@param names table<string, boolean>?  of the files that are written there
---@return moonlet.Place
function partial.place_of_file(path, names)
  path = core.file_target(path) or path
  return { out = path, parent = parent_and_name(path), dir = path .. ".partial",
    owns = function(name) return names and names[name] end }
end

-- ---- beginning and going on --------------------------------------------------------------------

-- What others have put there stays, and the directory with it.
local function remove_dir(place)
  local dir = place.dir
  for name in pairs(core.list_dir(dir) or {}) do
    if place.owns((name:gsub("%.partial$", ""))) then os.remove(dir .. "/" .. name) end
  end
  os.remove(dir .. "/" .. JOURNAL) -- last: without it nobody knows what the others are
  os.remove(dir)
end

local function new(place, journal, head)
  return setmetatable({ place = place, dir = place.dir, journal = journal, head = head,
    done = {}, kept = {}, noted = false, sum = "" }, Partial)
end

local function sum_of(before, line) return core.sha256(before .. line):sub(1, SUM_DIGITS) end

-- The journal's lines without their sums, and the last of those; nil with the number of a line that
-- is not as it was written.
local function read_lines(text)
  local lines, sum = {}, ""
  for whole in text:gmatch("([^\n]*)\n") do
    local line = whole:sub(SUM_DIGITS + 2)
    sum = sum_of(sum, line)
    lines[#lines + 1] = line
    if whole ~= sum .. " " .. line then return nil, #lines end
  end
  return lines, sum
end

-- Takes over what lines say: the head, how many items of each file are complete, what was kept.
local function take_over(self, lines, sum)
  self.head, self.sum, self.noted = json.decode(lines[1]), sum, #lines > 1
  for i = 2, #lines do
    local name, value = lines[i]:match("^(%S+) (.+)$")
    local n = value:find("^%d+$") and math.tointeger(tonumber(value))
    if n then
      self.done[name] = n
    else
      self.kept[name] = self.kept[name] or {}
      table.insert(self.kept[name], json.decode(value))
    end
  end
  return self
end

-- Whether a journal without a line is one whose first line a death cut off: nothing else is written
-- before that.
local function is_begun(tail, files)
  local sum, line = tail:sub(1, SUM_DIGITS), tail:sub(SUM_DIGITS + 1, SUM_DIGITS + 3)
  if sum:find("%X") or line ~= (' {"'):sub(1, #line) then return false end
  local first = next(files)
  return first == JOURNAL and next(files, first) == nil
end

-- Which part of the plan differs from the one that was begun, or nil.
local function difference(begun, wanted)
  for _, part in ipairs(json.keys(wanted)) do
    if begun[part] ~= wanted[part] then return part end
  end
end

-- What a journal says, if a run with this plan can go on with it.
local function read_journal(place, journal, plan)
  local text, tail = journal:text()
  local self = new(place, journal)
  if text == "" and is_begun(tail, core.list_dir(place.dir) or {}) then return self end
  local lines, sum = read_lines(text)
  if text == "" or not lines and sum == 1 then
    return nil, ("%s: exists, and no run can go on with it (its journal is damaged or of another "
      .. "origin); remove it"):format(place.dir), "format"
  elseif not lines then
    return nil, ("%s/journal: line %d is damaged: it cannot be gone on with; remove %s"):format(
      place.dir, sum, place.dir), "format"
  end
  take_over(self, lines, sum)
  local differs = difference(self.head.plan, plan)
  if not differs then return self end
  return nil, ("%s: begun with another %s; go on as it was begun, or remove it"):format(place.dir,
    differs), "io"
end

---Opens the directory that another run left, if there is one, and checks that it is what is wanted.
---An empty one is what death leaves at the very beginning. Writes nothing.
---@param place moonlet.Place
---@param plan table<string, string>  what must be the same for the bytes to be the same
---@param resume boolean
---@return moonlet.Partial|false|nil partial  false: there is none
---@return string? message
---@return string? code
function partial.find(place, plan, resume)
  if core.file_kind(place.dir) == "link" then
    return nil, place.dir .. ": exists, and no run can go on with it (it is a link); remove it",
      "io"
  end
  if not core.file_kind(place.dir) then return false end
  local files = core.list_dir(place.dir)
  if files and not next(files) then
    if resume or place.dir == place.out then return false end
    return nil, place.dir .. ": exists, left by a run that died or of another origin; remove it",
      "io"
  end
  local journal, message, code = core.journal_open(place.dir .. "/" .. JOURNAL)
  if not journal then
    if code == "busy" then return nil, place.dir .. ": another run is writing it", code end
    return nil, ("%s: exists, and no run can go on with it (%s); remove it"):format(place.dir,
      message), code
  end
  local self
  if resume then
    self, message, code = read_journal(place, journal, plan)
    if self then return self end
  else
    message = place.dir .. ": left by a run that was cut off; resume it (--resume) or remove it"
    code = "io"
  end
  journal:close()
  return nil, message, code
end

-- A new directory with a locked journal.
local function take(place)
  local is_new = not core.list_dir(place.dir)
  if is_new then
    local ok, message, code = core.make_dir(place.dir)
    if not ok then return nil, message, code end
  end
  local journal, message, code = core.journal_create(place.dir .. "/" .. JOURNAL)
  if journal then return new(place, journal) end
  if is_new then os.remove(place.dir) end
  return nil, message, code
end

-- Whether OUT is as it was when the run looked first: another may have finished before this one had
-- the lock.
local function is_still_free(place)
  if not place.is_tree then return true end
  local renamed, message, code = look_at(place.out)
  if renamed == nil then return nil, message, code end
  if renamed == (place.dir == place.out) then return true end
  return nil, place.out .. ": another run is writing it", "busy"
end

---Begins the directory, or takes what `find` found; from now on it is there to be finished, left
---or removed.
---@param place moonlet.Place
---@param found moonlet.Partial|false
---@param head table  with `plan`
---@return moonlet.Partial? partial
---@return string? message
---@return string? code
function partial.begin(place, found, head)
  local self, problem, kind = found, nil, nil
  if not self then self, problem, kind = take(place) end
  if not self then return nil, problem, kind end
  local ok, message, code = is_still_free(place)
  if ok and not self.head then
    self.head = head
    ok, message, code = self:append(json.encode(head))
  end
  if ok then return self end
  self:leave()
  return nil, message, code
end

-- ---- its content -------------------------------------------------------------------------------

---Bytes on the disk already.
---@return integer
function Partial:held()
  local bytes = 0
  for name in pairs(core.list_dir(self.dir) or {}) do
    bytes = bytes + (core.file_info(self.dir .. "/" .. name) or 0)
  end
  return bytes
end

---How far a file is: "complete", or the number of its items that are.
---@param name string
---@return "complete"|integer
function Partial:progress(name)
  local files = core.list_dir(self.dir) or {}
  if files[name] then return "complete" end
  return files[name .. ".partial"] and self.done[name] or 0
end

---@private
function Partial:append(line)
  local sum = sum_of(self.sum, line)
  local ok, message, code = self.journal:append(sum .. " " .. line)
  if ok then self.sum = sum end
  return ok, message, code
end

---The first n items of a file are on the disk.
---@param name string
---@param n integer
function Partial:note(name, n)
  self.noted = true
  return self:append(("%s %d"):format(name, n))
end

---Writes a value down for a run that goes on from here.
---@param what string
---@param value table
function Partial:keep(what, value)
  self.noted = true
  return self:append(("%s %s"):format(what, json.encode(value)))
end

---The values that runs before this one wrote down.
---@param what string
---@return table[]
function Partial:recall(what) return self.kept[what] or {} end

---The path of a file that is written from its beginning: what a process that died left of it goes.
---@param name string
---@return string path
function Partial:anew(name)
  local path = self.dir .. "/" .. name
  if core.file_kind(path .. ".partial") then os.remove(path .. ".partial") end
  return path
end

---@param name string
---@param bytes string
function Partial:write(name, bytes)
  return core.file_write(self:anew(name), bytes)
end

-- ---- its end -----------------------------------------------------------------------------------

---Gives the directory its name.
---@return true? ok
---@return string? message
---@return string? code
function Partial:finish()
  local place = self.place
  local ok, message, code = core.sync_dir(self.dir)
  if not ok then return nil, message, code end
  if self.dir ~= place.out then
    ok, message = os.rename(self.dir, place.out)
    if not ok then return nil, ("%s: %s"):format(place.out, message), "io" end
    self.dir = place.out
  end
  ok, message, code = core.sync_dir(place.parent)
  if not ok then return nil, message, code end
  os.remove(self.dir .. "/" .. JOURNAL)
  self.journal:close()
  return true
end

---Gives a complete file of the directory the name of the output: what is there is replaced.
---@param name string
---@return true? ok
---@return string? message
---@return string? code
function Partial:deliver(name)
  local place = self.place
  local ok, message = os.rename(self.dir .. "/" .. name, place.out)
  if not ok then return nil, ("%s: %s"):format(place.out, message), "io" end
  return core.sync_dir(place.parent)
end

---Lets go of a directory that `find` found, as it is.
function Partial:close() self.journal:close() end

---Leaves the directory for another run to go on with, or removes it if nothing in it is complete.
---@return boolean left
function Partial:leave()
  if not self.noted then self:remove() end
  self.journal:close()
  return self.noted
end

---Removes the directory, unless it has its name already.
function Partial:remove()
  if self.dir ~= self.place.out then remove_dir(self.place) end
  self.journal:close()
end

-- ---- files beside the weights ------------------------------------------------------------------

-- What belongs to a checkpoint besides weights: tokenizer, templates, generation and processor
-- settings, licence, card.
local SIDE_SUFFIXES = { "%.json$", "%.jinja$", "%.txt$", "%.md$", "%.model$", "%.tiktoken$" }
local SIDE_PREFIXES = { "^LICEN[CS]E", "^NOTICE", "^USE_POLICY" }
-- Written anew, or telling what the source's files were packed like: GPTQ tools, ModelOpt.
local NOT_COPIED = { ["config.json"] = true, ["moonlet.json"] = true,
  ["quantize_config.json"] = true, ["quant_config.json"] = true, ["hf_quant_config.json"] = true }

local function is_side_file(name)
  if NOT_COPIED[name] or name:find("%.index%.json$") or name:find("^%.") then return false end
  for _, list in ipairs { SIDE_SUFFIXES, SIDE_PREFIXES } do
    for _, pattern in ipairs(list) do
      if name:find(pattern) then return true end
    end
  end
  return false
end

---Whether a file of this name in a checkpoint's directory belongs to the checkpoint.
---@param name string
---@return boolean
function partial.is_part(name)
  return NOT_COPIED[name] or name:find("%.safetensors$") or name:find("%.index%.json$")
    or is_side_file(name) or false
end

---The files to copy from a source, with their sizes; each can be read.
---@param source string
---@return table<string, integer>? files
---@return string? message
---@return string? code
function partial.side_files(source)
  local names, message, code = core.list_dir(source)
  if not names then return nil, message, code end
  local files = {}
  for name, is_file in pairs(names) do
    if is_file and is_side_file(name) then
      local path = source .. "/" .. name
      local file, problem = io.open(path, "rb")
      if not file then return nil, problem, "io" end
      file:close()
      files[name], message, code = core.file_info(path)
      if not files[name] then return nil, message, code end
    end
  end
  return files
end

---@param source string
---@param files table<string, integer>
function Partial:copy(source, files)
  for name in pairs(files) do
    local bytes, message, code = sys.read_file(source .. "/" .. name)
    if not bytes then return nil, message, code end
    local ok
    ok, message, code = self:write(name, bytes)
    if not ok then return nil, message, code end
  end
  return true
end

return partial
