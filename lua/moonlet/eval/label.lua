--- Short names of recipes and checkpoints for tables and pictures.
local json = require "moonlet.json"
local sys = require "moonlet.sys"

local label = {}

---"unsloth 4 mxfp", "uniform nvfp4".
---@param name string
---@param options table of the recipe
---@return string
function label.recipe(name, options)
  -- Anchored, as a pattern that begins anywhere takes the square of a long name's time.
  local words = { name:find("%.lua$") and name:sub(1, -5):gsub("^.*/", "") or name }
  for _, key in ipairs { "bits", "mode", "group" } do words[#words + 1] = options[key] end
  if options.mxfp then words[#words + 1] = "mxfp" end
  return table.concat(words, " ")
end

---What a checkpoint was made by, if its moonlet.json tells, or the name of its directory.
---@param dir string
---@return string
function label.checkpoint(dir)
  local path = dir .. "/moonlet.json"
  local made = sys.exists(path) and json.read_object(path)
  local recipe = made and json.is_object(made.recipe) and made.recipe
  if recipe and type(recipe.name) == "string" then
    return label.recipe(recipe.name, json.is_object(recipe.options) and recipe.options or {})
  end
  return dir:match("([^/]+)/*$") or dir
end

return label
