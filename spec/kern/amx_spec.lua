-- The AMX kernels have the same bits on machines without tiles: the specs of products run against
-- a module in which tile instructions are emulated (spec/support/amx_emulator.c).

local core = require "moonlet.core"

--- The pattern with which Lua finds the module with the emulator, which lies beside the other.
local function cpath()
  local path = assert(package.searchpath("moonlet.core", package.cpath))
  return (path:gsub("moonlet/core%.so$", "amx/?.so"))
end

--- What to skip for; nil if there is nothing.
local function obstacle()
  local best = core.kernels()[#core.kernels()].level
  if best == "amx" then return "there are tiles here, which the other specs use" end
  if best ~= "avx512bf16" then return "AMX is emulated beside BF16; this machine has " .. best end
end

describe("emulated AMX", function()
  local function run(command)
    local pipe = assert(io.popen(command .. " 2>&1"))
    local text = pipe:read("a")
    return pipe:close(), text
  end

  it("is there", function()
    if obstacle() then return pending(obstacle()) end
    local _, names = run(([[lua5.4 -e 'package.cpath = "%s"
      for _, k in ipairs(require("moonlet.core").kernels()) do print(k.name) end']])
      :format(cpath()))
    assert.truthy(names:find("\navx512bf16\namx\n", 1, true), names)
  end)

  it("makes the same products as every variant", function()
    if obstacle() then return pending(obstacle()) end
    local ok, text = run(
      ("busted -o plainTerminal --cpath=%q spec/kern/int8_spec.lua spec/kern/bf16_spec.lua "
        .. "spec/kern/select_spec.lua"):format(cpath()))
    assert(ok, text)
    assert.truthy(text:find(" 0 failures / 0 errors / 0 pending", 1, true), text)
  end)
end)
