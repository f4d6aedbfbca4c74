-- moonlet agent, as a user sees it.

local json = require "moonlet.json"
local call = require("spec.support.said").call
local workspace = require "spec.support.workspace"

local ENV <const> = "LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' LUA_CPATH='"
  .. package.cpath:gsub("'", "") .. "' "

describe("moonlet agent", function()
  local place
  before_each(function() place = workspace.new { ["work/notes.txt"] = "one\ntwo\n" } end)
  after_each(function() place.remove() end)

  local function script(answers)
    local lines = {}
    for i, text in ipairs(answers) do lines[i] = json.encode { text = text } end
    place.write("script.jsonl", table.concat(lines, "\n"))
    return "--replay " .. place.path "script.jsonl"
  end

  -- Output of both kinds, and the exit code.
  local function agent(arguments, input)
    local pipe = assert(io.popen(("%slua5.4 bin/moonlet agent --cwd %s %s %s 2>&1"):format(ENV,
      place.path "work", arguments, input or "</dev/null")))
    local text = pipe:read("a")
    local _, _, code = pipe:close()
    return text, code
  end

  it("shows what is said, called and answered", function()
    local text, code = agent(script { "I look.\n\n" .. call("read", { path = "notes.txt" }),
      "<think>\nTwo lines.\n</think>\n\nIt has two lines." } .. " -p Count")
    assert.equal(0, code)
    assert.matches('^I look%.\n> read "path": "notes.txt"\n  | one\n  | two\n'
      .. "%(thinking%) Two lines%.\nIt has two lines%.\n"
      .. "%(2 turns, %d+ tokens generated, %d+ read, %d+ known%)\n$", text)
  end)

  it("works with the demo model", function()
    place.write("work/window.md", "Meet Leo at 5 o'clock.\nLeo likes the orange.")
    local text, code = agent("--task 'What is the first line of window.md?' --tools read,write "
      .. "--temp 0 --ctx 1024")
    assert.equal(0, code)
    assert.matches("The first line is: Meet Leo at 5 o'clock.\n", text, 1, true)
  end)

  it("shows the beginning of long results and of long arguments", function()
    place.write("work/long.txt", ("a line\n"):rep(100))
    place.write("work/wide.txt", ("\u{20AC}"):rep(500) .. "\nend\n")
    local text = agent(script { call("read", { path = "long.txt" }),
      call("read", { path = "wide.txt" }),
      call("read", { path = ("\u{20AC}"):rep(200) }), "Done." } .. " -p Go")
    assert.matches("\n  | a line\n  | %(90 more lines%)\n", text)
    assert.matches("\n  | [\u{20AC}]+%.%.%.\n  | end\n", text)
    assert.matches("\u{20AC}%.%.%.\n", text)
    assert.truthy(utf8.len(text))
  end)

  it("runs what changes things only when permitted", function()
    local options = script { call("bash", { command = "touch made" }), "Done." } .. " -p Go "
    assert.matches("not permitted; the user has to start the agent with %-%-yes", agent(options))
    assert.is_nil(place.read "work/made")
    assert.matches("  | %[no output%]", (agent(options .. "--yes")))
    assert.equal("", place.read "work/made")
  end)

  -- The same at a terminal, with what is typed there.
  local function at_terminal(arguments, typed)
    place.write("typed", typed)
    local pipe = assert(io.popen(("%sscript -qec 'lua5.4 bin/moonlet %s' /dev/null <%s"):format(ENV,
      arguments, place.path "typed")))
    local text = pipe:read("a")
    pipe:close()
    return (text:gsub("\r\n", "\n"))
  end

  it("shows control characters of texts from elsewhere instead of obeying them", function()
    place.write("work/esc", "one\27[2A\rtwo\u{9B}K\ttab\r\n\u{202E}three\127\n")
    local text = agent(script { "Look\27]0;x\7\n" .. call("read", { path = "esc" }),
      "Done.\u{85}" } .. " -p Go")
    assert.matches("Look\\u{1B}]0;x\\u{7}\n> read", text, 1, true)
    assert.matches("  | one\\u{1B}[2A\\u{D}two\\u{9B}K\ttab\n  | \\u{202E}three\\u{7F}\n",
      text, 1, true)
    assert.matches("Done.\\u{85}", text, 1, true)
    assert.is_nil(text:find("[\0-\8\11-\31\127]"))
    assert.is_nil(text:find("\xC2[\x80-\x9F]"))
  end)

  it("asks at a terminal with the whole of what it would run", function()
    local command = "true " .. ("x"):rep(500) .. "\27[1K\n touch made"
    local options = script { call("bash", { command = command }), "Done." }
    local function ask(typed)
      return at_terminal(("agent --cwd %s %s -p Go"):format(place.path "work", options), typed)
    end
    local text = ask "n\n"
    assert.matches("Run bash \"command\": \"true " .. ("x"):rep(500)
      .. "\\u001b[1K\\n touch made\"? [y]es, [n]o, [a]lways: ", text, 1, true)
    assert.matches("the user refused this call", text)
    assert.is_nil(place.read "work/made")
    ask "y\n"
    assert.equal("", place.read "work/made")
  end)

  it("takes tasks from standard input, in one conversation", function()
    local saved = place.path "talk.jsonl"
    local text, code = agent(script { "First.", "Second." } .. " --save " .. saved,
      "<<'X'\nOne\n\nTwo\n/quit\nThree\nX")
    assert.equal(0, code)
    assert.matches("^First%.\n%b()\nSecond%.\n%b()\n$", text)
    local _, lines = place.read("talk.jsonl"):gsub("\n", "")
    assert.equal(5, lines)
    text, code = agent(script { "Third." } .. " -p Go --resume " .. saved)
    assert.equal(0, code)
    assert.matches("^Third", text)
    _, lines = place.read("talk.jsonl"):gsub("\n", "")
    assert.equal(7, lines)
  end)

  it("prints events as JSON", function()
    local text = agent(script { call("read", { path = "notes.txt" }), "Two." }
      .. " -p Count --json")
    local kinds = {}
    for line in text:gmatch("[^\n]+") do
      local event = assert(json.decode(line))
      if kinds[#kinds] ~= event.kind then kinds[#kinds + 1] = event.kind end
      assert.equal("kind", json.keys(event)[1])
    end
    assert.same({ "tool_call", "usage", "turn", "tool_result", "content", "usage", "turn", "end" },
      kinds)
  end)

  it("fails with one line when there is no answer", function()
    local text, code = agent(script { call("read", { path = "notes.txt" }) }
      .. " -p Go --max-steps 2")
    assert.equal(1, code)
    assert.matches("%(the turns are used up %(%-%-max%-steps%)%)\n", text)
    assert.matches("moonlet: the turns are used up %(%-%-max%-steps%)\n$", text)
    text, code = agent(script { "x" } .. " -p Go --resume " .. place.path "none.jsonl")
    assert.equal(1, code)
    assert.matches("^moonlet: [^\n]*none.jsonl[^\n]*\n$", text)
  end)

  it("says what a failing engine says", function()
    for _, row in ipairs { { ', "message": "GPU on fire"', "GPU on fire" },
      { "", "the generation was ended" } } do
      place.write("script.jsonl", '{"text": "abc", "finish_reason": "error"' .. row[1] .. "}")
      local text, code = agent("-p Go --replay " .. place.path "script.jsonl")
      assert.equal(1, code)
      assert.equal("abc\nmoonlet: " .. row[2] .. "\n", text)
    end
  end)

  it("refuses what contradicts itself", function()
    for _, options in ipairs { "--save a --resume b", "--system x --resume b", "--max-steps 0",
      "--task ''" } do
      local text, code = agent("--replay x " .. options)
      assert.equal(2, code, options)
      assert.matches("^moonlet: [^\n]*try: moonlet agent %-%-help[^\n]*\n$", text)
    end
  end)

  it("takes what it runs with it when a second Ctrl-C ends it at once", function()
    local options = script { call("bash", { command = "trap 'touch asked' TERM; echo $$ >pid; "
      .. "mv pid ready; while :; do sleep 1000; done" }) }
    local text = place.run(("cd '%s' && (%slua5.4 bin/moonlet agent --cwd %s %s -p Go --yes & "
      .. "cd %s; until [ -e ready ]; do sleep 0.02; done; kill -INT $!; "
      .. "until [ -e asked ]; do sleep 0.02; done; kill -INT $!; wait $!; echo code $?; "
      .. "read pid <ready; i=0; while grep -qs . /proc/$pid/cmdline && [ $i -lt 500 ]; "
      .. "do i=$((i + 1)); sleep 0.02; done; [ $i -lt 500 ] && echo gone || kill -9 -$pid)"):format(
        os.getenv("PWD"), ENV, place.path "work", options, place.path "work"))
    assert.matches("\ncode 130\ngone\n$", text)
  end)

  for _, row in ipairs { { "INT", "-p Go" }, { "TERM", "-p Go" }, { "TERM", "" } } do
    local signal, way = table.unpack(row)
    it(("ends a task at SIG%s, with what it runs: agent %s"):format(signal, way), function()
      local options = script { call("bash", { command = "echo $$ >pid; mv pid ready; "
        .. "exec sleep 1000" }) }
      local text = place.run(("cd '%s' && (echo Go | %slua5.4 bin/moonlet agent --cwd %s %s %s "
        .. "--yes & until [ -e %s ]; do sleep 0.02; done; kill -%s $!; wait $!; echo code $?)")
        :format(os.getenv("PWD"), ENV, place.path "work", options, way, place.path "work/ready",
          signal))
      assert.matches("the user interrupted the tool", text)
      assert.matches("moonlet: interrupted\ncode 1\n$", text)
      local pid = place.run("cat " .. place.path "work/ready"):match "%d+"
      assert.is_nil(io.open("/proc/" .. pid .. "/cmdline"))
    end)
  end
end)
