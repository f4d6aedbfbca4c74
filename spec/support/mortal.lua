--- Scripts in processes of their own, which may be killed.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"

local mortal = {}

-- die() kills the process as no handler can see; ticking(t, key) makes it die just before the call
-- of any such function that makes tick() count up to `mortal`.
local PRELUDE <const> = [[
package.path, package.cpath = %q, %q
local core = require "moonlet.core"
local function die() os.execute("kill -9 $PPID") end
local n_ticks, last_tick = 0, %d
local function tick()
  n_ticks = n_ticks + 1
  if n_ticks == last_tick then die() end
end
local function ticking(t, key)
  local f = t[key]
  t[key] = function(...) tick() return f(...) end
end
]]

---What a script prints.
---@param script string
---@param opts? { tick: integer?, ms: integer? } it dies at that tick, or after so many milliseconds
---@return string
function mortal.run(script, opts)
  opts = opts or {}
  local path = os.tmpname()
  checkpoint.spit(path, PRELUDE:format(package.path, package.cpath, opts.tick or 0) .. script)
  local limit = opts.ms and ("timeout -s KILL %.3f "):format(opts.ms / 1000) or ""
  local p = assert(io.popen(("SOURCE_DATE_EPOCH=0 exec %slua5.4 %s 2>&1"):format(limit, path)))
  local said = p:read("a")
  p:close()
  os.remove(path)
  return said
end

---A new directory, in memory where there is such a place: much of what is written is synced.
---@return string dir
function mortal.directory()
  local p <close> = assert(io.popen("mktemp -d -p /dev/shm 2>/dev/null || mktemp -d"))
  return p:read("l")
end

---The files of a directory by their hashes.
---@param dir string
---@return table<string, string>
function mortal.contents(dir)
  local files = {}
  for name in pairs(assert(core.list_dir(dir))) do
    files[name] = core.file_kind(dir .. "/" .. name) == "file"
      and core.sha256(checkpoint.slurp(dir .. "/" .. name)) or "directory"
  end
  return files
end

return mortal
