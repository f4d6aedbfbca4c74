local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local sandbox = require "moonlet.sandbox"

-- What a chunk gives for some arguments, in a sandbox of its own.
local function run(text, limits, ...)
  local box <close> = assert(sandbox.open(limits))
  local chunk, message, code = box:load(text, "test.lua")
  if not chunk then return nil, message, code end
  return chunk(...)
end

local function fails(pattern, code_wanted, text, limits, ...)
  local ok, message, code = run(text, limits, ...)
  assert.is_nil(ok, text)
  assert.matches(pattern, message, nil, nil, text)
  assert.is_nil(message:find("%c"), text)
  assert.equal(code_wanted, code, text)
end

describe("sandbox", function()
  describe("values", function()
    it("go in and come out as copies", function()
      local given = { 1, 2.5, "x\0y", true, a = { b = { c = -7 } }, [false] = 0, [0.5] = 1 }
      local ok, back, n, nothing, yes = run("local t = ... return t, select('#', ...), nil, true",
        nil, given, nil, 4)
      assert.is_true(ok)
      assert.same(given, back)
      assert.are_not.equal(given, back)
      assert.equal(3, n)
      assert.is_nil(nothing)
      assert.is_true(yes)
      assert.equal("integer", math.type(back[1]))
      run("local t = ... t.a.b.c, t[1] = nil, 5", nil, given)
      assert.same({ b = { c = -7 } }, given.a)
    end)

    it("of every size survive", function()
      local list = {}
      for i = 1, 3000 do list[i] = i end
      local ok, back = run("return ...", nil, list)
      assert.is_true(ok)
      assert.same(list, back)
      local results = table.pack(run("return table.unpack(..., 1, 3000)", nil, list))
      assert.equal(3001, results.n)
      assert.equal(3000, results[3001])
      assert.same({ true, ("x"):rep(60000) }, { run("return ...", nil, ("x"):rep(60000)) })
    end)

    it("that are functions come out as handles, which can go back in", function()
      local box <close> = assert(sandbox.open())
      local _, t = assert(box:load([[
        local n = 0
        local function count() n = n + 1 return n end
        return { count = count, call = function(f, x) return f(x), f == count end }]], "a"))()
      assert.is_true(sandbox.is_function(t.count))
      assert.is_false(sandbox.is_function(print))
      assert.is_false(sandbox.is_function(nil))
      assert.same({ true, 1 }, { t.count() })
      assert.same({ true, 2, true }, { t.call(t.count) })
      assert.same({ true, 3, true }, { t.call(t.count, { deep = { t.count } }) })
      local other <close> = assert(sandbox.open())
      local _, f = assert(other:load("return function(x) return x end", "b"))()
      assert.error_matches(function() f(t.count) end, "a function of another sandbox")
      assert.error_matches(function() f(print) end, "a sandbox takes no function")
      assert.error_matches(function() f { { [print] = 1 } } end, "a sandbox takes no function")
      assert.error_matches(function() f(io.stdout) end, "a sandbox takes no userdata")
      other:close()
      assert.error_matches(function() f(1) end, "sandbox is closed")
      assert.error_matches(function() other:load("", "x") end, "sandbox is closed")
    end)

    it("that are too deep or have strange keys do not pass", function()
      local cyclic = {}
      cyclic[1] = cyclic
      assert.error_matches(function() run("return 1", nil, cyclic) end, "nest at most 8 deep")
      fails("returned tables nested more than 8 deep", "format", "local t = {} t[1] = t return t")
      fails("returned a table with a table for a key", "format", "return { [{}] = 1 }")
      fails("returned a table with a function for a key", "format", "return { { [type] = 1 } }")
    end)
  end)

  it("has the pure libraries and nothing of the process", function()
    local ok, names = run [[
      local names = {}
      for name, value in pairs(_ENV) do
        names[#names + 1] = name
        if type(value) == "table" then
          for member in pairs(value) do names[#names + 1] = name .. "." .. member end
        end
      end
      table.sort(names)
      return table.concat(names, " ")]]
    assert.is_true(ok)
    assert.equal("_VERSION assert error ipairs math math.abs math.acos math.asin math.atan "
      .. "math.ceil math.cos math.deg math.exp math.floor math.fmod math.huge math.log math.max "
      .. "math.maxinteger math.min math.mininteger math.modf math.pi math.rad math.sin math.sqrt "
      .. "math.tan math.tointeger math.type math.ult next pairs rawequal rawlen select string "
      .. "string.byte string.char string.find string.format string.gmatch string.gsub string.len "
      .. "string.lower string.match string.pack string.packsize string.rep string.reverse "
      .. "string.sub string.unpack string.upper table table.concat table.insert table.move "
      .. "table.pack table.remove table.sort table.unpack tonumber tostring type utf8 utf8.char "
      .. "utf8.charpattern utf8.codepoint utf8.codes utf8.len utf8.offset", names)
    -- methods of strings are the same functions
    assert.same({ true, true, "nil", "X" },
      { run "return (''):rep(2) == '' and ('').rep == string.rep, type(('').dump), ('x'):upper()" })
    run "string.upper = nil"
    assert.equal("X", ("x"):upper())
  end)

  it("refuses what it does not have, in a line", function()
    local cases = {
      ["getmetatable('').__index = nil"] = "attempt to call a nil value %(global 'getmetatable'%)",
      ["setmetatable({}, { __gc = function() while true do end end })"] = "global 'setmetatable'",
      ["load('return 1')()"] = "global 'load'", ["dofile '/etc/passwd'"] = "global 'dofile'",
      ["require 'os'"] = "global 'require'", ["coroutine.wrap(print)"] = "global 'coroutine'",
      ["pcall(error)"] = "global 'pcall'", ["os.exit()"] = "global 'os'",
      ["debug.sethook()"] = "global 'debug'", ["string.dump(type)"] = "field 'dump'",
      ["math.random()"] = "field 'random'", ["local x <close> = {}"] = "non%-closable value",
    }
    for text, pattern in pairs(cases) do fails("^test%.lua:1: .*" .. pattern, "format", text) end
  end)

  it("turns every error into a line", function()
    fails("^test%.lua:1: attempt to index a nil value %(local 't'%)$", "format",
      "local t return t.x")
    fails("^%(error object is a table value%)$", "format", "error {}")
    fails("^%(error object is a nil value%)$", "format", "error()")
    fails("^%(error object is a function value%)$", "format", "error(type)")
    fails("^a%?%[31mb$", "format", "error('a\\27[31mb\\nc', 0)")
    fails("^x+$", "format", "error(('x'):rep(10000), 0)")
    fails("unexpected symbol near", "format", "return {")
    fails("attempt to load a binary chunk", "format", string.dump(function() end))
    fails("overflow", "format", "return " .. ("("):rep(1000) .. "1" .. (")"):rep(1000))
    fails("^longer than 256 KiB$", "limit", ("x = 1 "):rep(50000))
    assert.same({ true, 1 }, { run("return ...", nil, 1) })
  end)

  it("stops what takes too long, also where no instruction shows it", function()
    for _, text in ipairs { "while true do end", "local function f() return f() end f()",
        "for i = 1, 1e18 do end", "local s = '' while true do s = s .. 'x' end",
        "return (''):rep(1e18)", "return ('x'):rep(1e15)", "return ('x'):rep(1e12, ('y'):rep(1e3))",
        "return ('a'):rep(3000):find(('a-'):rep(30) .. 'b')",
        "return ('a'):rep(100):find(('a*'):rep(30) .. 'b')",
        "for _ in ('a'):rep(100):gmatch(('.-'):rep(30) .. 'b') do end",
        "return ('a'):rep(1000):gsub(('(a*)'):rep(9) .. 'b', '')",
        "local s = ('a'):rep(60000) while true do s:find(('a'):rep(30000) .. 'b', 1, true) end",
        "table.move({}, 1, 1 << 60, 2)", "table.concat({}, '', 1, 1 << 60)",
        "table.unpack({}, 1, 1 << 60)", "table.unpack({}, math.mininteger, math.maxinteger)",
        "local t = {} for i = 1, 9000 do t[i] = i end while true do table.sort(t) end",
        "local t = {} for i = 1, 9000 do t[i] = i end while true do table.insert(t, 1, 1) end",
        "local t = {} for i = 1, 9000 do t[i] = i end while true do table.remove(t, 1) end",
        "local s = ('x'):rep(60000) while true do s:upper() end",
        "local s = ('x'):rep(60000) while true do utf8.len(s) end",
        "local s = ('1'):rep(60000) while true do tonumber(s) end",
        "local x, t = ('x'):rep(60000), {} for i = 1, 1000 do t[i] = x end return t",
        "local t = {} for i = 1, 7 do t = { t, t, t, t, t, t, t, t } end return t" } do
      fails("^runs too long$", "limit", text)
    end
  end)

  it("stops what takes too much memory", function()
    local limits = { memory = 4 << 20, block = 1 << 20 }
    for _, text in ipairs { "local s = 'x' while true do s = s .. s end",
        "local t = {} for i = 1, 1e9 do t[i] = { i } end",
        "local t = {} while true do t[#t + 1] = ('x'):rep(1e5) .. #t end",
        "return ('x'):rep(2e6)", "local function f() return 1 + f() end f()",
        "return (('x'):rep(1e6):gsub('x', 'yy'))" } do
      fails("^needs more than 4096 KiB of memory, or 1024 KiB in one piece$", "limit", text,
        { memory = limits.memory, block = limits.block, instructions = 1 << 30 })
    end
    -- rubbish does not count, and the next call finds everything in order
    local box <close> = assert(sandbox.open(limits))
    local f = assert(box:load("for i = 1, 20 do local s = ('x'):rep(1e5) .. i end return #...",
      "x"))
    for _ = 1, 20 do assert.same({ true, 3 }, { f("abc") }) end
    assert.same({ nil, "no memory for a sandbox of 1 KiB", "memory" },
      { core.sandbox_open { memory = 1024 } })
  end)

  it("stops at the same instruction on every run", function()
    local function last(n)
      local box <close> = assert(sandbox.open { instructions = n })
      local ok, loop, get = assert(box:load([[
        local i = 0
        return function() while true do i = i + 1 end end, function() return i end]], "x"))()
      assert.is_true(ok)
      assert.same({ nil, "runs too long", "limit" }, { loop() })
      return select(2, get())
    end
    local n = last(1000000)
    assert.is_true(n > 100000 and n < 1000000)
    for _ = 1, 3 do assert.equal(n, last(1000000)) end
    assert.is_true(last(100000) < n)
  end)

  it("every call may take as long as any", function()
    local box <close> = assert(sandbox.open { instructions = 20000 })
    local f = assert(box:load("for i = 1, 4000 do end return 1", "x"))
    for _ = 1, 50 do assert.same({ true, 1 }, { f() }) end
  end)

  it("ends at Ctrl-C", function()
    local script = os.tmpname()
    checkpoint.spit(script, ([[package.path, package.cpath = %q, %q
      require("moonlet.sys").catch_interrupt()
      os.execute("(sleep 0.2; kill -INT $PPID) &")
      local box = require("moonlet.sandbox").open { instructions = 1 << 60 }
      print(box:load("while true do end", "x")())]]):format("./lua/?.lua;" .. package.path,
        package.cpath))
    local pipe = assert(io.popen("timeout 20 lua5.4 " .. script))
    assert.equal("nil\tinterrupted\tcancelled\n", pipe:read("a"))
    pipe:close()
    os.remove(script)
  end)

  it("raises on misuse", function()
    assert.error_matches(function() sandbox.open { memory = 0 } end, "'memory' must be positive")
    assert.error_matches(function() sandbox.open { time = 1 } end, "unknown option 'time'")
    assert.error_matches(function() sandbox.open { block = "x" } end, "integer expected")
    local box <close> = assert(sandbox.open())
    assert.error_matches(function() box:load(4) end, "string expected")
    box:close()
    box:close()
  end)
end)

-- The standard library is what the functions that replace it are compared with.
describe("patterns in a sandbox", function()
  local ATOMS = { "a", "b", "%a", "%d", "%w", "%s", "%S", "%x", "%p", "%u", "%%", ".", "[ab]",
    "[^ab]", "[a-c]", "[%d_]", "[^%s]", "[]]", "[^]]", "[a-]", "(", "(", ")", ")", "()", "$", "^",
    "%1", "%2", "%b()", "%bxy", "%f[%w]", "%f[%W]", "[", "]", "%", "-", "*", "+", "?", "\0", "[%",
    "[^%a-z]", "%g", "%l", "%c", "%P" }
  local SUFFIXES = { "", "", "", "", "*", "+", "-", "?" }
  local CHARACTERS = { "a", "b", "c", "1", "2", "_", " ", "(", ")", "x", "y", "]", "-", "%", "$",
    "^", "\0", "\xe4", "A" }
  local REPLACEMENTS = { "<%0>", "%1", "%2", "%%", "x", "%9", "%", { a = 1, b = false, c = "y" } }

  -- Run on both sides; gmatch as a list of what it gives, callbacks made on the spot.
  local CALLS = [[
    return function(name, ...)
      if name == "gmatch" then
        local list = {}
        for a, b in string.gmatch(...) do list[#list + 1] = { a, b } end
        return list
      elseif name == "callback" then
        local s, p, max = ...
        return string.gsub(s, p, function(a, b) return b and a .. b end, max)
      end
      return string[name](...)
    end]]

  local rng = core.rng(5)
  local function draw(list) return list[1 + math.floor(rng:uniform() * #list)] end
  local function text(n, list, suffixes)
    local t = {}
    for i = 1, math.floor(rng:uniform() * (n + 1)) do
      t[i] = draw(list) .. (suffixes and draw(suffixes) or "")
    end
    return table.concat(t)
  end

  -- Results as a list, or the error without its place.
  local function outcome(ok, ...)
    if ok then return { ... } end
    return { error = (tostring((...)):gsub("^[^:]*:%d+: ", "")) }
  end

  it("are those of Lua", function()
    local box <close> = assert(sandbox.open())
    local _, mine = assert(box:load(CALLS, "calls"))()
    local theirs = assert(load(CALLS))()
    local n_errors, n_matches = 0, 0
    for _ = 1, 1500 do
      local s, p = text(10, CHARACTERS), text(5, ATOMS, SUFFIXES)
      local init = draw { false, false, -12, -3, 0, 2, 5, 12 } or nil
      local max = draw { false, false, -1, 0, 1, 3 } or nil
      local calls = { { "find", s, p, init }, { "match", s, p, init }, { "find", s, p, init, true },
        { "gmatch", s, p, init }, { "gsub", s, p, draw(REPLACEMENTS), max },
        { "callback", s, p, max } }
      for _, call in ipairs(calls) do
        local want = outcome(pcall(theirs, table.unpack(call, 1, 5)))
        local got = outcome(mine(table.unpack(call, 1, 5)))
        assert.same(want, got, ("%s %q %q %s"):format(call[1], s, p, init or max))
        if want.error then n_errors = n_errors + 1 elseif want[1] then n_matches = n_matches + 1 end
      end
    end
    assert.is_true(n_errors > 500 and n_matches > 1000)
  end)

  it("refuse what is no text", function()
    fails("bad argument #1 to 'find' %(string expected, got no value%)", "format",
      "string.find()")
    fails("bad argument #2 to 'match' %(string expected, got table%)", "format",
      "string.match('x', {})")
    fails("bad argument #3 to 'gsub' %(string/function/table expected", "format",
      "string.gsub('x', 'x', true)")
    fails("invalid replacement value %(a table%)", "format",
      "string.gsub('x', 'x', function() return {} end)")
    assert.same({ true, 2, 2 }, { run "return string.find(123, 2)" })
    assert.same({ true, "1.5", 1 }, { run "return ('x'):gsub('x', 1.5)" })
  end)
end)
