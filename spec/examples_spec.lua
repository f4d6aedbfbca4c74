-- Every example runs and prints something; so does the tour in the README.

local ENV <const> = "LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' LUA_CPATH='"
  .. package.cpath:gsub("'", "") .. "' "

local function run(command)
  local pipe = assert(io.popen(ENV .. command .. " 2>&1"))
  local text = pipe:read("a")
  local ok = pipe:close()
  assert(ok, command .. " failed:\n" .. text)
  return text
end

describe("examples", function()
  for _, name in ipairs { "agent", "custom_recipe", "custom_sampler" } do
    it(name .. ".lua runs", function()
      local text = run("lua5.4 examples/" .. name .. ".lua")
      assert.is_true(#text > 10)
      if name == "agent" then assert.matches("I copied ticket.txt to walnut.md.", text, 1, true) end
    end)
  end

  it("quickstart.lua plans, quantizes, measures, answers and calls a tool #slow", function()
    local text = run("lua5.4 examples/quickstart.lua")
    for _, part in ipairs { "expert_gate .- mxfp4", "28%.8 MB %-> 10%.6 MB", "11804 tokens",
      "Paris", "Rome", "<function=calculator>", "540 %* 737" } do
      assert.matches(part, text)
    end
  end)

  it("hello.lua answers", function()
    assert.matches("Paris", run("lua5.4 examples/hello.lua"))
  end)

  it("are complete programs under 60 lines", function()
    local pipe = assert(io.popen("ls examples/*.lua"))
    for path in pipe:lines() do
      local n = 0
      for _ in io.lines(path) do n = n + 1 end
      assert(n < 60, path .. " is too long")
    end
    pipe:close()
  end)
end)

describe("the README's tour", function()
  local file = assert(io.open("README.md"))
  local readme = file:read("a")
  file:close()
  local n = 0
  for kind, block in readme:gmatch("<!%-%- tour %-%->\n```(%w+)\n(.-)```") do
    n = n + 1
    it("block " .. n .. " runs as written", function()
      local path = os.tmpname()
      local script = assert(io.open(path, "w"))
      -- Another run of the specs may be at the same place.
      local out = path .. "-tour"
      script:write(kind == "sh" and "set -e\n" or "", (block:gsub("/tmp/moonlet%-tour", out)))
      script:close()
      run((kind == "sh" and "sh " or "lua5.4 ") .. path)
      os.execute(("rm -rf %s %s*"):format(path, out))
    end)
  end
  it("has blocks", function() assert.equal(4, n) end)
end)
