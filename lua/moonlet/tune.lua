--- Which kernels models compute with: those that are fastest here when measured, not by what the
--- processor claims alone. All give the same numbers.
--
-- The first model that is opened on a processor measures for about a sixth of a second; the result
-- is kept in a file. Nothing is measured where MOONLET_CPU names kernels or there is no choice.
local core = require "moonlet.core"
local json = require "moonlet.json"
local version = require "moonlet.version"

local tune = {}

-- What models spend their time with: single tokens and prompts, in 8 bits, in f32 and in bf16.
local PRODUCTS <const> = {
  { mode = "mxfp4", n_x = 1, fast = true, repeats = 8 },
  { mode = "mxfp4", n_x = 32, fast = true, repeats = 2 },
  { mode = "mxfp4", n_x = 256, fast = true, repeats = 1 },
  { mode = "mxfp4", n_x = 1, fast = false, repeats = 8 },
  { mode = "mxfp4", n_x = 32, fast = false, repeats = 1 },
  { mode = "bf16", n_x = 32, fast = true, repeats = 1 },
}
local ROWS <const>, COLS <const> = 256, 2048 -- stays in a second-level cache
local ROUNDS <const>, SECONDS <const> = 5, 0.15

-- What the processor claims to be best is replaced by what is faster by more than noise.
local MARGIN <const> = 1.05

local function matrices()
  local n = ROWS * COLS
  return {
    mxfp4 = { mode = "mxfp4", bits = 4, group = 32, rows = ROWS, cols = COLS,
      codes = ("\x35\x2a"):rep(n // 4), scales = ("\x78"):rep(n // 32) },
    bf16 = { mode = "bf16", bits = 16, rows = ROWS, cols = COLS, codes = ("\x2a\x3c"):rep(n) },
  }
end

---Seconds of each kind of product with each of the kernels, measured in turn: of each the fastest
---of several rounds.
---@param names string[]
---@return table<string, number[]>
function tune.measure(names)
  local all, best, start = matrices(), {}, core.seconds()
  local x = string.pack("<f", 0.01):rep(COLS * 256)
  for _, name in ipairs(names) do best[name] = {} end
  for _ = 1, ROUNDS do
    for i, p in ipairs(PRODUCTS) do
      for _, name in ipairs(names) do
        local _, seconds = core.kern_run(name, "linear", { matrix = all[p.mode], n_x = p.n_x,
          fast = p.fast, repeats = p.repeats, x = x:sub(1, p.n_x * COLS * 4) })
        best[name][i] = math.min(best[name][i] or math.huge, seconds)
      end
    end
    if core.seconds() - start > SECONDS then break end
  end
  return best
end

---The fastest of some kernels.
---@param names string[] the last is the best by what the processor claims
---@param seconds table<string, number[]> as from measure
---@return string name, table<string, number> times how many times as long as it each of them takes
function tune.fastest(names, seconds)
  local last, means = names[#names], {}
  for _, name in ipairs(names) do
    local sum = 0
    for i, s in ipairs(seconds[name]) do sum = sum + math.log(s / seconds[last][i]) end
    means[name] = math.exp(sum / #seconds[name])
  end
  local chosen = last
  for _, name in ipairs(names) do
    if means[name] * MARGIN < means[last] and means[name] < means[chosen] then chosen = name end
  end
  local times = {}
  for _, name in ipairs(names) do times[name] = means[name] / means[chosen] end
  return chosen, times
end

-- ---- the file -----------------------------------------------------------------------------------

-- Variables that are set to nothing count as unset (XDG Base Directory Specification).
local function variable(name)
  local value = os.getenv(name)
  return value ~= "" and value or nil
end

local function cache_dir()
  local dir, home = variable("XDG_CACHE_HOME"), variable("HOME")
  if dir and dir:sub(1, 1) == "/" then return dir end
  return home and home .. "/.cache" or nil
end

-- The processor as Linux calls it, with the kernels that can be had: a hypervisor may hide some.
local function processor(names)
  local file <close> = io.open("/proc/cpuinfo")
  local text = file and file:read(4096) or ""
  local function field(name) return text:match("\n" .. name .. "%s*:%s*([^\n]*)") or "?" end
  return ("%s, %s %s %s: %s"):format(field "model name", field "cpu family", field "model",
    field "stepping", table.concat(names, " "))
end

local function is_entry(entry, names)
  if not json.is_object(entry) or not json.is_object(entry.times) then return false end
  local known = false
  for _, name in ipairs(names) do
    known = known or name == entry.kernels
    if type(entry.times[name]) ~= "number" then return false end
  end
  return known
end

-- What the file holds about processors, nothing if another version wrote it or it is damaged.
local function read_entries(path)
  local kept = path and json.read_object(path)
  local usable = kept and kept.version == version and json.is_object(kept.processors)
  return usable and kept.processors or json.object {}
end

-- Others may do so at the same time: each writes a file of its own and puts it in place as a whole.
-- What cannot be written is measured again by the next process.
local function write_entries(dir, path, entries)
  local pid = (core.real_path("/proc/self") or ""):match("%d+$")
  if not pid then return end
  core.make_dir(dir)
  core.make_dir(dir .. "/moonlet")
  local own = path .. "." .. pid
  local file = io.open(own, "wb")
  if not file then return end
  local ok = file:write(json.encode({ version = version, processors = entries }), "\n")
  ok = file:close() and ok
  if not (ok and os.rename(own, path)) then os.remove(own) end
end

-- ---- the choice ---------------------------------------------------------------------------------

local remembered

local function choose(names, measure)
  local key, dir = processor(names), cache_dir()
  local path = dir and dir .. "/moonlet/cpu.json"
  local entries = read_entries(path)
  local entry = entries[key]
  if not is_entry(entry, names) then
    local kernels, times = tune.fastest(names, measure(names))
    entry = { kernels = kernels, times = times }
    entries[key] = entry
    if path then write_entries(dir, path, entries) end
  end
  return { kernels = entry.kernels, by = "measurement", times = entry.times }
end

---The kernels of models and why: `by` is "environment" (MOONLET_CPU), "default" (there are no
---others) or "measurement", with `times`: how many times as long as these each of them takes.
---@param measure? fun(names: string[]): table<string, number[]> instead of tune.measure
---@return { kernels: string, by: string, times: table<string, number>? }
function tune.kernels(measure)
  if variable("MOONLET_CPU") then return { kernels = core.kern_selected(), by = "environment" } end
  local names = {}
  for _, variant in ipairs(core.kernels()) do
    if variant.name ~= "scalar" then names[#names + 1] = variant.name end
  end
  if #names < 2 then return { kernels = core.kern_selected(), by = "default" } end
  if measure then return choose(names, measure) end
  remembered = remembered or choose(names, tune.measure)
  return remembered
end

return tune
