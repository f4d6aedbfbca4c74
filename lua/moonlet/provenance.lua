-- provenance: what a checkpoint was made of, and how, for whoever finds it later.
--
-- moonlet.json says it in the output; the same facts decide whether a run that was cut off can be
-- gone on with.

local core = require "moonlet.core"
local json = require "moonlet.json"
local sys = require "moonlet.sys"
local version = require "moonlet.version"

local provenance = {}

-- ---- the source --------------------------------------------------------------------------------

-- The length prefix and the header of a safetensors file, which name every tensor in it.
local function header(path)
  local file, message = io.open(path, "rb")
  if not file then return nil, message, "io" end
  local _ <close> = file
  local length = file:read(8)
  local text = length and #length == 8 and file:read((string.unpack("<I8", length)))
  if not text then return nil, path .. ": cut off within its header", "format" end
  return length .. text
end

local function sorted_names(set)
  local names = {}
  for name in pairs(set) do names[#names + 1] = name end
  table.sort(names)
  return names
end

---What a source is: a hash of config.json and of the names, sizes and headers of its weight files
---(weights themselves would take minutes to read), and a stamp that also changes when one of its
---files is written again.
---@param dir string
---@return { sha256: string, stamp: string }? source
---@return string? message
---@return string? code
function provenance.source(dir)
  local files, message, code = core.list_dir(dir)
  if not files then return nil, message, code end
  local facts, stamps = {}, {}
  for _, name in ipairs(sorted_names(files)) do
    local path = dir .. "/" .. name
    local text, size, changed
    if name == "config.json" then
      text, message, code = sys.read_own_file(path)
    elseif name:find("%.safetensors$") and not name:find("^%.") then
      text, message, code = header(path)
    else
      goto continue
    end
    if not text then return nil, message, code end
    size, changed, code = core.file_info(path)
    if not size then return nil, changed, code end
    facts[#facts + 1] = ("%s %d %s"):format(name, size, core.sha256(text))
    stamps[#stamps + 1] = ("%s %d"):format(facts[#facts], changed)
    ::continue::
  end
  return { sha256 = core.sha256(table.concat(facts, "\n")),
    stamp = core.sha256(table.concat(stamps, "\n")) }
end

-- ---- the plan ----------------------------------------------------------------------------------

local function decisions_text(decisions)
  local lines = {}
  for i, t in ipairs(decisions.tensors) do
    lines[i] = t.name .. " " .. json.encode(t.decision, { sort_keys = true })
  end
  return table.concat(lines, "\n")
end

---What must be the same for the bytes to be the same, in the order in which a difference is named.
---@param source { sha256: string, stamp: string }
---@param rule moonlet.Recipe
---@param decisions moonlet.Plan
---@param settings table  options of quantize that change bytes
---@return table<string, string>
function provenance.plan(source, rule, decisions, settings)
  return json.object({
    ["version of moonlet"] = version,
    source = source.stamp,
    recipe = core.sha256(rule.text or decisions_text(decisions)),
    ["choice of options"] = core.sha256(json.encode(settings, { sort_keys = true })),
    plan = core.sha256(decisions_text(decisions)),
  }, { "version of moonlet", "source", "recipe", "choice of options", "plan" })
end

---The time in UTC; SOURCE_DATE_EPOCH makes it reproducible (reproducible-builds.org).
---@return string
function provenance.date()
  local fixed = math.tointeger(tonumber(os.getenv("SOURCE_DATE_EPOCH") or ""))
  return os.date("!%Y-%m-%dT%H:%M:%SZ", fixed) --[[@as string]]
end

-- ---- moonlet.json ------------------------------------------------------------------------------

-- The last part of a path.
local function base_name(path)
  local real = core.real_path(path) or path
  return real:match("([^/]+)/*$") or real
end

-- What a source that moonlet wrote says about itself.
local function ancestor(dir)
  local path = dir .. "/moonlet.json"
  return sys.exists(path) and json.read_object(path) or nil
end

---Text of moonlet.json.
---@param p { source_dir: string, source: { sha256: string }, rule: moonlet.Recipe,
---  decisions: moonlet.Plan, settings: table, date: string, command: string? }
---@return string
function provenance.text(p)
  local rule, decisions = p.rule, p.decisions
  return json.encode(json.object({
    moonlet = version,
    date = p.date,
    command = p.command,
    source = json.object({ name = base_name(p.source_dir), sha256 = p.source.sha256,
      made_by = ancestor(p.source_dir) }, { "name", "sha256", "made_by" }),
    recipe = json.object({ name = rule.name, options = json.object(rule.options),
      text = rule.text }, { "name", "options", "text" }),
    settings = p.settings,
    result = json.object({ bytes = decisions.total_bytes, parameters = decisions.parameters,
      bits_per_weight = decisions.bits_per_weight },
      { "bytes", "parameters", "bits_per_weight" }),
    notes = decisions.notes,
  }, { "moonlet", "date", "command", "source", "recipe", "settings", "result", "notes" }),
    { indent = 2 }) .. "\n"
end

return provenance
