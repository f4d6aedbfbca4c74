--- Checkpoints as moonlet.quantize writes them, for specs to look at.
local assert = require "luassert"
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local quantize = require "moonlet.quantize"

local written = {}

---Calls fn(out, dir) with a directory name that is free, and removes what is there afterwards.
function written.with_out(fn)
  local dir = checkpoint.directory()
  local _ <close> = setmetatable({}, { __close = function() checkpoint.remove(dir) end })
  fn(dir .. "/out", dir)
end

---Quantizes by options `o` and calls fn(out, plan) with what came of it.
function written.quantized(o, fn)
  written.with_out(function(out, dir)
    local given = { out = out }
    for k, v in pairs(o) do given[k] = v end
    local p, message = quantize(given)
    assert(p, message)
    assert.same({ out = false }, core.list_dir(dir))
    fn(out, p)
  end)
end

---The notes on a plan, but for that on golden models, none of which has a tokenizer.
function written.notes(p)
  local notes = {}
  for _, note in ipairs(p.notes) do
    if note ~= "the source has no tokenizer, and neither will the checkpoint" then
      notes[#notes + 1] = note
    end
  end
  return notes
end

---All tensors of the files of a directory.
function written.tensors(dir)
  local all = {}
  for name in pairs(core.list_dir(dir)) do
    if name:find("%.safetensors$") then
      for key, t in pairs(checkpoint.read(dir .. "/" .. name)) do
        assert.is_nil(all[key])
        all[key] = t
      end
    end
  end
  return all
end

function written.assert_same_tensors(want, got)
  for name, t in pairs(want) do
    local u = got[name]
    assert.truthy(u, name .. " is missing")
    assert.equal(t.dtype, u.dtype, name)
    assert.same(t.shape, u.shape, name)
    assert.is_true(t.data == u.data, name .. ": other bytes")
  end
  for name in pairs(got) do assert.truthy(want[name], name .. " is too many") end
end

---Matrices of a checkpoint by their names below the text stack, with values as f32 bytes.
function written.modules(dir)
  local modules = {}
  for _, m in ipairs(assert(core.model_layout(dir, { values = true })).modules) do
    modules[m.name] = m
  end
  return modules
end

return written
