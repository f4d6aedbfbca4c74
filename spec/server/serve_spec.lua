-- The command: what it prints, how it ends, what it refuses.

local workspace = require "spec.support.workspace"

local PATHS <const> = "LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' LUA_CPATH='"
  .. package.cpath:gsub("'", "") .. "' "

-- Whoever runs the specs may have been started by nohup, which ignores SIGHUP in all that follows.
local function shell(script)
  local pipe = assert(io.popen("env --default-signal=HUP bash 2>&1 <<'END'\n" .. script .. "\nEND"))
  local text = pipe:read("a")
  pipe:close()
  return text
end

-- A server with one slow answer as $pid, listening at $port, its output in $out; $dir is scratch.
local START <const> = [[
dir=$(mktemp -d); out=$dir/out; trap 'rm -rf $dir' EXIT
printf '{"text": "one two three four five", "delay_ms": 150}\n' >$dir/answers
]] .. PATHS .. [[ lua5.4 bin/moonlet serve --port 0 --verbose --replay $dir/answers >$out 2>&1 &
pid=$!
for i in $(seq 100); do grep -q serves $out && break; sleep 0.05; done
port=$(sed -n 's/^http:..127.0.0.1:\([0-9]*\) serves demo-model$/\1/p' $out)
ask() {
  body='{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
  exec 3<>/dev/tcp/127.0.0.1/$port
  printf 'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n' >&3
  printf 'Content-Length: %d\r\n\r\n%s' ${#body} "$body" >&3
  cat <&3
}
# Begins a request and waits for the first of its answer; waits until nobody listens any more.
begin() { ask >$dir/reply & asking=$!; until grep -q one $dir/reply; do sleep 0.02; done; }
until_closed() { while (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null; do sleep 0.02; done; }
]]

describe("moonlet serve", function()
  it("serves, lets answers end when it is told to, and ends well", function()
    for _, signal in ipairs { "INT", "TERM", "HUP" } do
      local text = shell(START .. "begin; kill -" .. signal .. " $pid; wait $pid; echo rc $?;"
        .. "wait $asking; cat $dir/reply $out")
      assert.matches("rc 0\n", text)
      assert.matches(' five"', text, 1, true)
      assert.matches("data: [DONE]", text, 1, true)
      assert.matches("moonlet: POST /v1/chat/completions 200 ", text, 1, true)
    end
  end)

  -- The file of hooks is read once the command catches signals, and before the server does.
  it("ends when it is told so before it serves", function()
    local place = workspace.new {}
    for _, signal in ipairs { "INT", "TERM", "HUP" } do
      for _, rest in ipairs { "return {}", "while true do pcall(error) end" } do
        place.write("hooks.lua", ("io.popen('kill -%s $PPID'):close() %s"):format(signal, rest))
        local text = shell(PATHS .. "timeout 20 lua5.4 bin/moonlet serve --port 0 --hooks "
          .. place.path "hooks.lua" .. "; echo rc $?")
        assert.equal("moonlet: interrupted\nrc 1\n", text)
      end
    end
    place.remove()
  end)

  it("outlives its terminal where nohup has started it", function()
    local text = shell("trap '' HUP\n" .. START
      .. "kill -HUP $pid; kill -HUP $pid; ask; kill -TERM $pid; wait $pid; echo rc $?")
    assert.matches("data: [DONE]", text, 1, true)
    assert.matches("rc 0\n", text)
  end)

  it("ends at once when it is told so twice", function()
    for _, case in ipairs { { "INT", "INT", 130 }, { "INT", "TERM", 0 }, { "TERM", "INT", 0 } } do
      local text = shell(START:gsub('"delay_ms": 150', '"delay_ms": 5000')
        .. ("begin; kill -%s $pid; until_closed; kill -%s $pid;"):format(case[1], case[2])
        .. "wait $pid; echo rc $?; wait $asking; cat $dir/reply")
      assert.matches("rc " .. case[3] .. "\n", text)
      assert.is_nil(text:find("[DONE]", 1, true))
    end
  end)

  it("takes hooks from a file, and logs those that fail", function()
    local place = workspace.new { ["hooks.lua"] = [[
      local n = 0
      return { on_response = function(message)
        n = n + 1
        if n == 2 then error("no second time") end
        message.content = message.content:upper()
      end }]] }
    local text = shell(START:gsub("%-%-verbose", "--hooks " .. place.path "hooks.lua")
      .. "ask; ask; kill -TERM $pid; wait $pid; echo rc $?; cat $out")
    place.remove()
    assert.matches("ONE TWO THREE FOUR FIVE", text, 1, true)
    assert.matches('"code":"hook_failed"', text, 1, true)
    assert.matches("rc 0\n", text)
    assert.matches("moonlet: hook on_response: [^\n]*hooks%.lua:4: no second time", text)
  end)

  it("says in one line what it will not do", function()
    for _, row in ipairs {
      { "--host 0.0.0.0 --port 0", 1, "--insecure%-bind" },
      { "--api-key-file no-such-file", 1, "no%-such%-file" },
      { "--api-key-file /dev/zero", 1, "/dev/zero: more than 1048576 bytes" },
      { "--replay /dev/zero --port 0", 1, "/dev/zero: more than 67108864 bytes" },
      { "--hooks /dev/zero --port 0", 1, "/dev/zero:1" },
      { "--api-key-file /tmp", 1, "/tmp: Is a directory" },
      { "--allow-host http://a", 2, "'%-%-allow%-host': the name of a host expected" },
      { "--allow-host a:8080", 2, "'%-%-allow%-host': the name of a host expected" },
      { "--allow-origin null", 2, "'%-%-allow%-origin': an origin as app://obsidian.md expected" },
      { "--allow-origin app://a/b", 2, "'%-%-allow%-origin': an origin" },
      { "--name a@b", 2, "'%-%-name': a text without '@' expected" },
      { "--name ''", 2, "'%-%-name': a text" },
      { "no-such-dir", 1, "no%-such%-dir" },
      { "--hooks README.md --port 0", 1, "README.md:3" },
      { "--replay README.md --port 0", 1, "README.md:1" },
      { "--cache-ram much", 2, "a size as 512M or 4G expected" },
      { "--port 70000", 2, "0 to 65535 expected" },
    } do
      local text = shell(PATHS .. "timeout 20 lua5.4 bin/moonlet serve " .. row[1]
        .. "; echo rc $?")
      assert.matches("^moonlet: [^\n]*" .. row[3] .. "[^\n]*\nrc " .. row[2] .. "\n$", text)
    end
  end)
end)
