--- Option tables: an unknown key or a wrong type is a mistake of the caller and raises.
local options = {}

---@param given table? what the caller passed
---@param known table<string, string> allowed keys and their types ("any" takes everything)
---@return table given the same table, or an empty one
function options.check(given, known)
  if given == nil then return {} end
  if type(given) ~= "table" then
    error("option table expected, got " .. type(given), 3)
  end
  for key, value in pairs(given) do
    local want = known[key]
    if not want then error(("unknown option '%s'"):format(tostring(key)), 3) end
    local got = math.type(value) or type(value)
    local fits = want == "any" or got == want or type(value) == want
    if not fits then
      error(("option '%s': %s expected, got %s"):format(key, want, got), 3)
    end
  end
  return given
end

return options
