-- MOONLET_CPU chooses the kernels.

local core = require "moonlet.core"

local levels = { "scalar", "avx2", "avx512base", "avx512vnni", "avx512", "avx512bf16",
  "amx" }

--- Name of the kernels selected by a fresh process, or its error message.
local function selected(value)
  local code = ("package.cpath = %q print(pcall(require('moonlet.core').kern_selected))"):format(
    package.cpath)
  local pipe = assert(io.popen(("MOONLET_CPU=%s lua5.4 -e %q"):format(value, code)))
  local ok, text = pipe:read("a"):match("^(%a+)\t(.-)\n$")
  pipe:close()
  return ok == "true", text
end

describe("MOONLET_CPU", function()
  it("forces any of the variants that there are", function()
    for _, variant in ipairs(core.kernels()) do
      local ok, name = selected(variant.level)
      assert.is_true(ok)
      assert.equal(variant.name, name)
    end
  end)

  it("left empty gives the best", function()
    local kernels = core.kernels()
    local ok, name = selected("")
    assert.is_true(ok)
    assert.equal(kernels[#kernels].name, name)
  end)

  it("is refused above what there is", function()
    local kernels = core.kernels()
    local best, above = kernels[#kernels], false
    for _, level in ipairs(levels) do
      if above then
        local ok, message = selected(level)
        assert.is_false(ok)
        assert.equal(("MOONLET_CPU: no %s here, the best there is is %s"):format(level, best.name),
          message)
      end
      above = above or level == best.level
    end
  end)

  it("is refused when it is no name", function()
    local ok, message = selected("sse2")
    assert.is_false(ok)
    assert.equal("MOONLET_CPU: 'sse2' is none of " .. table.concat(levels, ", "), message)
  end)
end)
