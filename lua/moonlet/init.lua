--- moonlet: run and quantize Qwen3.5 / Qwen3.6 models from Lua.
--
-- World failures return nil, message, code; misuse (a wrong type, an unknown option, a closed
-- handle) raises. Everything large has close() and works with <close>.
local core = require "moonlet.core"

local moonlet = {
  _VERSION = require "moonlet.version",
  quantize_tensor = core.quantize_tensor,
  dequantize_tensor = core.dequantize_tensor,
}

---Opens a checkpoint directory; see moonlet.model.
---@param dir string
---@param options? { threads?: integer, precision?: "fast"|"exact" }
---@return moonlet.Model? model, string? message, string? code
function moonlet.open(dir, options)
  return require("moonlet.model").open(dir, options)
end

---Opens a tokenizer without weights; see moonlet.tokenizer.
---@param path string a tokenizer.json or the directory that holds one
function moonlet.tokenizer(path)
  return require("moonlet.tokenizer").open(path)
end

-- The rest is loaded when first used: a script that only plans needs no engine.
local parts = {
  agent = "moonlet.agent",
  bench = "moonlet.bench",
  budget = "moonlet.eval.budget",
  eval = "moonlet.eval",
  imatrix = "moonlet.imatrix",
  jinja = "moonlet.jinja",
  json = "moonlet.json",
  plan = "moonlet.plan",
  quantize = "moonlet.quantize",
  recipe = "moonlet.recipe",
  reference = "moonlet.reference",
  safetensors = "moonlet.safetensors",
  sampler = "moonlet.sampler",
  serve = "moonlet.server",
  target = "moonlet.target",
  tools = "moonlet.tools",
}

return setmetatable(moonlet, {
  __index = function(self, key)
    local part = parts[key] and require(parts[key])
    rawset(self, key, part)
    return part
  end,
})
