-- bench/*.lua as a user meets them who gets an argument wrong: one line on stderr and nothing else.

local PATHS <const> = "LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' LUA_CPATH='"
  .. package.cpath:gsub("'", "") .. "' "

-- What a script says with both streams, and its exit code.
local function run(arguments)
  local pipe = assert(io.popen(PATHS .. "lua5.4 bench/" .. arguments .. " 2>&1 </dev/null"))
  local text = pipe:read("a")
  local _, _, code = pipe:close()
  return text, code
end

describe("a script of bench/", function()
  for _, row in ipairs {
    { "few.lua", 2, "^usage: lua5.4 bench/few.lua DIR" },
    { "few.lua examples/demo-model x", 2, "^usage: " },
    { "few.lua examples/demo-model 0", 2, "^usage: " },
    { "few.lua examples/demo-model 2 -1", 2, "^usage: " },
    { "few.lua /nosuch", 1, "^few: /nosuch/config.json: No such file" },
    { "kern.lua foo", 2, "^kern: no kernels named 'foo' here; there are scalar" },
    { "kern.lua scalar many", 2, "^kern: rows: a whole number, or memory, expected" },
    { "kern.lua scalar 64 100", 2, "^kern: cols: a multiple of 128 expected" },
    { "kern.lua scalar 64 128 0", 2, "^kern: threads: 1 to 1024 expected" },
    { "kern.lua scalar 64 128 1 foo", 2, "^kern: no mode named 'foo'" },
    { "step.lua foo", 2, "^usage: lua5.4 bench/step.lua" },
    { "step.lua texts", 2, "^usage: " },
    { "step.lua policies x", 2, "^usage: " },
    { "step.lua texts /nosuch", 1, "^step: /nosuch" },
    { "quantize.lua", 2, "^usage: " },
    { "recipes.lua", 2, "^usage: " },
    { "side_by_side.lua 'a = foo b'", 2, "^side_by_side: an engine is " },
    { "side_by_side.lua --threads x 'a = moonlet b'", 2, "^side_by_side: " },
    { "side_by_side.lua --rounds 0 'a = moonlet b'", 2, "^side_by_side: " },
    { "side_by_side.lua --drift x 'a = moonlet b'", 2, "^side_by_side: " },
    { "side_by_side.lua --prompt -1 'a = moonlet b'", 2, "^side_by_side: " },
    { "side_by_side.lua", 2, "^side_by_side: missing argument 'engines'" },
    { "side_by_side.lua --depth 0,x 'a = moonlet b'", 2, "^side_by_side: " },
  } do
    it("refuses " .. row[1], function()
      local text, code = run(row[1])
      assert.matches("^[^\n]*\n$", text)
      assert.matches(row[3], text)
      assert.equal(row[2], code)
    end)
  end
end)
