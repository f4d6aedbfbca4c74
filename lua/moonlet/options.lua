--- Mistakes of the caller: they raise, at the line outside moonlet that made them.
local options = {}

local HOME <const> = debug.getinfo(1, "S").source:match("^(.*)options%.lua$") or "="

local function is_ours(info)
  return info ~= nil and info.source:sub(1, #HOME) == HOME
end

---Raises with the position of the script's line, however deep inside moonlet the mistake is found.
---@param message string
function options.misuse(message)
  local level, info = 2, debug.getinfo(2, "S")
  while info do
    local caller = debug.getinfo(level + 1, "S")
    -- What is written in C, such as pcall, belongs to whom it was called by.
    if not is_ours(info) and not (info.what == "C" and is_ours(caller)) then break end
    level, info = level + 1, caller
  end
  error(message, level)
end

---@param given table? what the caller passed
---@param known table<string, string> allowed keys and their types ("any" takes everything,
---  "string|table" either)
---@return table given the same table, or an empty one
function options.check(given, known)
  if given == nil then return {} end
  if type(given) ~= "table" then
    options.misuse("option table expected, got " .. type(given))
  end
  for key, value in pairs(given) do
    local want = known[key]
    if not want then options.misuse(("unknown option '%s'"):format(tostring(key))) end
    local got, fits = math.type(value) or type(value), want == "any"
    for kind in want:gmatch("%a+") do fits = fits or kind == got or kind == type(value) end
    if not fits then
      options.misuse(("option '%s': %s expected, got %s"):format(key, want:gsub("|", " or "), got))
    end
  end
  return given
end

---Raises if an option is given and is none of the choices.
---@param given table
---@param key string
---@param choices string[]
function options.choice(given, key, choices)
  for _, choice in ipairs(choices) do
    if given[key] == nil or given[key] == choice then return end
  end
  options.misuse(("option '%s': %s expected, got '%s'"):format(key, table.concat(choices, " or "),
    given[key]))
end

return options
