-- The written include rule (CONTRIBUTING.md), and what else can be read off the source.

-- room -> rooms whose headers it may include besides its own
local MAY_INCLUDE = {
  base = {},
  num = { "base" },
  kern = { "num", "base" },
  io = { "base" },
  text = { "io", "base" },
  model = { "kern", "num", "io", "base" },
  quant = { "model", "kern", "num", "io", "base" },
  sample = { "kern", "base" },
  net = { "base" },
  lua = { "base", "num", "kern", "io", "text", "model", "quant", "sample", "net" },
}

-- what each room may include in angle brackets besides the C and POSIX headers
local LIBRARIES = {
  ["json-c"] = { io = true },
  ["pcre2.h"] = { text = true },
  ["utf8proc.h"] = { text = true },
  ["nettle/"] = { io = true },
  ["event2"] = { net = true },
  ["immintrin.h"] = { kern = true },
  ["dlfcn.h"] = { kern = true },
  ["lua.h"] = { lua = true },
  ["lauxlib.h"] = { lua = true },
  ["lualib.h"] = { lua = true },
}

-- Lua modules that orchestrate: they may not reach into the C module
local ORCHESTRATION = { "^agent/", "^cli/", "^eval$", "^eval/", "^quantize$", "^server/",
  "^tools/" }

local function orchestrates(module)
  for _, pattern in ipairs(ORCHESTRATION) do
    if module:find(pattern) then return true end
  end
  return false
end

local function list(command)
  local pipe <close> = assert(io.popen(command))
  local lines = {}
  for line in pipe:lines() do lines[#lines + 1] = line end
  return lines
end

local function contains(array, value)
  for _, v in ipairs(array) do
    if v == value then return true end
  end
  return false
end

local function each_line(path, fn)
  local n = 0
  for line in io.lines(path) do
    n = n + 1
    fn(line, n)
  end
  return n
end

local c_files = list("find csrc -name '*.[ch]' | sort")
local lua_files = list(
  "find lua recipes examples spec -name '*.lua' -not -path '*/golden/*' | sort")

describe("source", function()
  it("includes only what its room may", function()
    assert.is_true(#c_files > 20)
    local bad = {}
    for _, path in ipairs(c_files) do
      local room = path:match("^csrc/(%w+)/")
      local allowed = assert(MAY_INCLUDE[room], "unknown room of " .. path)
      each_line(path, function(line, n)
        local target = line:match('^%s*#%s*include%s+"([^"]+)"')
        local from = target and target:match("^(%w+)/")
        if target and (not from or (from ~= room and not contains(allowed, from))) then
          bad[#bad + 1] = ("%s:%d includes %s"):format(path, n, target)
        end
        local library = line:match("^%s*#%s*include%s+<([^>]+)>")
        for name, rooms in pairs(LIBRARIES) do
          if library and library:find(name, 1, true) == 1 and not rooms[room] then
            bad[#bad + 1] = ("%s:%d includes <%s>"):format(path, n, library)
          end
        end
      end)
    end
    assert.same({}, bad)
  end)

  it("requires only downwards", function()
    local bad = {}
    for _, path in ipairs(lua_files) do
      local module = path:match("^lua/moonlet/(.+)%.lua$")
      each_line(path, function(line, n)
        local target = line:match('require%s*%(?%s*["\']([%w_.]+)["\']')
        local wrong = target and (
          path:match("^recipes/")
          or module and orchestrates(module) and target == "moonlet.core"
          or path:match("^examples/") and target == "moonlet.core"
          or module and not orchestrates(module) and module ~= "init"
            and orchestrates((target:gsub("^moonlet%.", ""):gsub("%.", "/"))))
        if wrong then bad[#bad + 1] = ("%s:%d requires %s"):format(path, n, target) end
      end)
    end
    assert.same({}, bad)
  end)

  it("stays narrow, short and finished", function()
    local bad = {}
    local all = table.move(lua_files, 1, #lua_files, #c_files + 1, { table.unpack(c_files) })
    for _, path in ipairs(all) do
      local n = each_line(path, function(line, i)
        if utf8.len(line) and utf8.len(line) > 100 then
          bad[#bad + 1] = ("%s:%d is wider than 100 columns"):format(path, i)
        end
        for _, word in ipairs { "TO" .. "DO", "FIX" .. "ME", "HA" .. "CK", "XX" .. "X" } do
          if line:find("%f[%w]" .. word .. "%f[%W]") then
            bad[#bad + 1] = ("%s:%d says %s"):format(path, i, word)
          end
        end
      end)
      if n > 900 then bad[#bad + 1] = ("%s has %d lines"):format(path, n) end
    end
    assert.same({}, bad)
  end)

  it("calls nothing from the C core that prints or ends the process", function()
    local bad = {}
    for _, path in ipairs(c_files) do
      if not path:match("^csrc/lua/") then
        each_line(path, function(line, n)
          for _, name in ipairs { "printf", "puts", "exit", "abort", "perror", "longjmp" } do
            if line:find("%f[%w_]" .. name .. "%s*%(") then
              bad[#bad + 1] = ("%s:%d calls %s"):format(path, n, name)
            end
          end
        end)
      end
    end
    assert.same({}, bad)
  end)
end)
