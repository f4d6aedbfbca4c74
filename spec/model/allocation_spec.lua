-- A decode step allocates nothing: counted in a module whose calls of the C library for memory are
-- counted (spec/support/alloc_counter.c), in a process of its own.

local SCRIPT <const> = [[
  local core = require "moonlet.core"
  local moonlet = require "moonlet"
  local precision, threads = arg[1], math.tointeger(arg[2])
  local model <close> = assert(moonlet.open("examples/demo-model",
    { precision = precision, threads = threads }))
  local prompt = {}
  for i = 1, 40 do prompt[i] = i end
  local function counted(what, steps, fn)
    local calls = core.allocations()
    for i = 1, steps do fn(i) end
    print(what, core.allocations() - calls)
  end
  local one, two
  counted("opening", 1, function()
    one, two = assert(model:session { ctx = 512 }), assert(model:session { ctx = 512 })
  end)
  assert(one.core:eval(prompt))
  assert(two.core:eval(prompt))
  assert(model:eval { { session = one, ids = { 1 } }, { session = two, ids = { 2 } } })
  -- 300 tokens take new pages of the cache, and a second block of attention
  counted("steps", 300, function(i) assert(one:step(i)) end)
  counted("steps of two", 100, function(i)
    assert(model:eval { { session = one, ids = { i } }, { session = two, ids = { i + 1 } } })
  end)
  counted("few tokens", 10, function(i) assert(two.core:eval { i, i + 1, i + 2, i + 3 }) end)

  -- Lua's own: the same for every step, and garbage at once
  collectgarbage()
  collectgarbage("stop")
  local kept = collectgarbage("count")
  local function bytes()
    local before = collectgarbage("count")
    for i = 1, 10 do two:step(i) end
    return (collectgarbage("count") - before) * 1024 // 10
  end
  local first, second, third = bytes(), bytes(), bytes()
  collectgarbage()
  print("of Lua", second == third and first >= second and math.tointeger(second) or "differs",
    (collectgarbage("count") - kept) < 1)
]]

describe("a decode step", function()
  local function run(precision, threads)
    local path = assert(package.searchpath("moonlet.core", package.cpath))
    -- Emulated tiles are in a module of their own, which does not count; what does has none.
    local dir, emulated = path:gsub("moonlet/core%.so$", ""):gsub("/amx/$", "/")
    local script = os.tmpname()
    local file = assert(io.open(script, "w"))
    assert(file:write(SCRIPT))
    file:close()
    local pipe = assert(io.popen(("%s LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' "
      .. "LUA_CPATH='%scounted/?.so' lua5.4 '%s' %s %d 2>&1"):format(
      emulated > 0 and "env -u MOONLET_CPU" or "", dir, script, precision, threads)))
    local text = pipe:read("a")
    pipe:close()
    os.remove(script)
    return text
  end

  for _, precision in ipairs { "fast", "exact" } do
    for _, threads in ipairs { 1, 3 } do
      it(("allocates nothing in C, %s, %d threads"):format(precision, threads), function()
        local text = run(precision, threads)
        local opening = math.tointeger(text:match("^opening\t(%d+)\n"))
        assert(opening and opening > 0, text)
        assert.equal("steps\t0\nsteps of two\t0\nfew tokens\t0\n", text:match("\n(steps.*)of Lua"))
      end)
    end
  end

  it("leaves nothing in Lua, and takes the same for every token", function()
    local bytes, is_gone = run("fast", 2):match("of Lua\t(%d+)\t(%a+)")
    assert.equal("true", is_gone)
    assert.is_true(math.tointeger(bytes) < 1024)
  end)
end)
