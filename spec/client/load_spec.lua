-- Many clients at once: those that read, that leave, that send nonsense. See load.py.

local function run(options)
  local pipe = assert(io.popen(("LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' LUA_CPATH='%s' "
    .. "python3 spec/client/load.py %s -- lua5.4 bin/moonlet serve examples/demo-model --port 0 "
    .. "--threads 1 --ctx 1024 --cache-ram 64M --queue 32 2>&1"):format(package.cpath, options)))
  local text = pipe:read("a")
  pipe:close()
  return text
end

describe("load #client", function()
  it("leaves every reply right, nothing stuck, memory bounded", function()
    -- A short run is mostly warming up: what the cache may hold is the growth that it may have.
    assert.matches("\nok\n$", run("--connections 16 --seconds 10 --growth 64"))
  end)
end)
