-- Programs beside the event loop.

local process = require "moonlet.process"
local sched = require "moonlet.sched"
local workspace = require "spec.support.workspace"

describe("a process", function()
  local loop, place
  before_each(function()
    loop, place = assert(sched.open()), workspace.new()
  end)
  after_each(function()
    loop:close()
    place.remove()
  end)

  -- process.run in a coroutine of the loop.
  local function run(given, meanwhile)
    local out
    given.cwd = given.cwd or place.dir
    loop:spawn(function()
      out = table.pack(process.run(loop, given))
      loop:stop()
    end)
    if meanwhile then loop:spawn(meanwhile) end
    assert(loop:run())
    return table.unpack(out, 1, out.n)
  end

  local function bash(command, more)
    local given = { argv = { "bash", "-c", command } }
    for name, value in pairs(more or {}) do given[name] = value end
    return assert(run(given))
  end

  local function wait_for(name)
    while not place.read(name) do loop:sleep(0.005) end
  end

  it("ends with its code and both outputs as they came", function()
    assert.same({ output = "out\nerr\nend\n", code = 3, timed_out = false },
      bash "echo out; echo err >&2; echo end; exit 3")
    assert.same({ output = "", code = 0, timed_out = false }, bash "true")
  end)

  it("is told what signal ended it", function()
    local result = bash "kill -9 $$"
    assert.equal(-1, result.code)
    assert.equal(9, result.signal)
  end)

  it("runs in its directory, with arguments that no shell reads", function()
    place.write("sub/here", "")
    assert.equal("here\n", run({ argv = { "ls" }, cwd = place.path "sub" }).output)
    assert.equal("$HOME; 'x'\n", run({ argv = { "echo", "$HOME; 'x'" } }).output)
  end)

  it("that cannot be run says why", function()
    local ok, message, code = run { argv = { "no-such-program" } }
    assert.same({ nil, ("cannot run no-such-program in %s: No such file or directory")
      :format(place.dir), "io" }, { ok, message, code })
    ok, message = run { argv = { "ls" }, cwd = place.path "none" }
    assert.is_nil(ok)
    assert.matches("cannot run ls in .*/none: No such file", message)
    assert.has_error(function() run { argv = {} } end)
    assert.has_error(function() run { argv = { "echo", "a\0b" } } end)
    assert.has_error(function() run { argv = { "echo", 3 } } end)
  end)

  it("has no input, none of our descriptors, no ignored signals and no terminal", function()
    assert.equal("", bash("cat").output)
    local file <close> = assert(io.open(place.path "f", "w"))
    assert.equal("0\n1\n2\n3\n", run({ argv = { "ls", "/proc/self/fd" } }).output) -- 3: ls's own
    assert.equal(141, bash("set -o pipefail; yes | head -n 1 >/dev/null").code)
    assert.not_equal(0, bash("exec 3</dev/tty").code)
    assert(file)
  end)

  it("may close its outputs and go on", function()
    assert.equal(4, bash("exec >&- 2>&-; echo x > late; exit 4").code)
    assert.equal("x\n", place.read "late")
  end)

  it("keeps beginning and end of long outputs", function()
    local result = bash("seq 100000", { bytes = 1000 })
    assert.is_true(#result.output < 1100)
    assert.matches("^1\n2\n", result.output)
    assert.matches("\n99999\n100000\n$", result.output)
    assert.matches("%[%.%.%. %d+ of 588895 bytes are left out here %.%.%.%]", result.output)
  end)

  -- A FIFO ends for its reader when nobody has it open for writing any more; until what this
  -- returns is called that is us. The reader has it open by then.
  local function watch_fifo()
    assert(os.execute("mkfifo " .. place.path "fifo"))
    local watcher = io.popen(("timeout 100 cat '%s'; echo end $?"):format(place.path "fifo"))
    local hold = assert(io.open(place.path "fifo", "r+"))
    hold:write("begun\n")
    hold:flush()
    assert.equal("begun", watcher:read("l"))
    return function()
      hold:close()
      local text = watcher:read("a")
      watcher:close()
      return text
    end
  end

  it("leaves nothing running in its group when it ends", function()
    local ended = watch_fifo()
    assert.equal(0, bash("exec 3>fifo; sleep 1000 >/dev/null 2>&1 & exit 0").code)
    assert.equal("end 0\n", ended())
  end)

  it("is stopped with its group when its time is over", function()
    local ended = watch_fifo()
    local result = bash("sleep 1000 3>fifo & wait", { seconds = 0.05 })
    assert.is_true(result.timed_out)
    assert.equal(15, result.signal)
    assert.equal("end 0\n", ended())
  end)

  it("is killed when it does not stop", function()
    local stop
    local result = run({ argv = { "bash", "-c",
      "trap '' TERM; touch ready; while true; do sleep 0.01; done" },
      on_start = function(fn) stop = fn end }, function()
        wait_for("ready")
        stop()
        stop()
      end)
    assert.equal(9, result.signal)
    assert.is_false(result.timed_out)
    stop() -- nobody is there any more
  end)

  it("may print for ever and not stop, and be left by an error meanwhile", function()
    -- Whoever runs it is broken off as soon as it has been asked to end.
    local problem, stop
    loop:spawn(function()
      local _
      _, problem = pcall(process.run, loop, { cwd = place.dir,
        argv = { "bash", "-c", "trap '' TERM; echo $$ >pid; touch ready; yes" },
        on_start = function(fn) stop = fn end })
      loop:stop()
    end)
    loop:spawn(function()
      wait_for("ready")
      stop()
      loop.ready = function() error("broken off", 0) end
    end)
    assert(loop:run())
    assert.equal("broken off", problem)
    assert.is_nil(io.open("/proc/" .. place.read("pid"):match("%d+")))
    loop:spawn(function() -- what was to kill it has its turn
      loop:sleep(0)
      loop:stop()
    end)
    assert(loop:run())
    assert.equal(0, #loop.timers)
  end)

  it("leaves no timers behind however often it prints", function()
    local most = 0
    local ready = loop.ready
    function loop.ready(...)
      most = math.max(most, #loop.timers)
      return ready(...)
    end
    bash("yes | head -c 4000000", { seconds = 1000 })
    assert.equal(0, most)
  end)

  it("lets others run meanwhile", function()
    local turns = 0
    local result = run({ argv = { "bash", "-c", "until [ -e go ]; do :; done; echo went" } },
      function()
        for _ = 1, 5 do
          loop:sleep(0.001)
          turns = turns + 1
        end
        place.write("go", "")
      end)
    assert.equal("went\n", result.output)
    assert.equal(5, turns)
  end)
end)
