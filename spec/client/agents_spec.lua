-- Vercel's AI SDK, opencode and qwen-code against scripted answers.

local client = require "spec.support.client"
local clients = require "spec.support.clients"
local said = require "spec.support.said"
local served = require "spec.support.served"

local THINKS <const> = { ctx = 65536, api_keys = { "key" },
  template_variables = { enable_thinking = true } }

-- What to put before a command: these clients need a newer Node.js than Debian's.
local function path() return ("PATH=%s/node:$PATH"):format(clients.dir()) end

describe("Vercel's AI SDK #client", function()
  it("answers, streams, reasons, calls a tool, reports failures", function()
    local server <close> = served.replay({ "Hm.\n</think>\n\nHello there.",
      "I think.\n</think>\n\nLet me look.\n\n" .. said.CALL, "Sun.\n</think>\n\nIt is sunny.",
      { text = "some", finish_reason = "error", message = "bad weight" } }, THINKS)
    local out = client.command(server, ("script=$PWD/spec/client/ai_sdk.mjs; cd %s/ai-sdk; "
      .. "%s node $script %s/v1"):format(clients.dir(), path(), server.url))
    assert.matches("ok\n$", out)
  end)

  it("says what it is asked to in docs/server.md", function()
    local work <close> = clients.scratch()
    local server <close> = served.replay({ "Hello there." }, { api_keys = { "none" } })
    work.write("proj/hello.mjs", (clients.documented("JavaScript", server.url)))
    local out = client.command(server, ("cd %s/proj; ln -s %s/ai-sdk/node_modules .; "
      .. "%s node hello.mjs"):format(work.dir, clients.dir(), path()))
    assert.equal("Hello there.", out)
  end)
end)

describe("agents over the chat API #client", function()
  -- What an agent prints, whose tool `shell` takes commands, in a folder of its own. `set_up(work,
  -- url)` is the script that runs it, with what docs/server.md says.
  local function makes_a_file(shell, set_up)
    local work <close> = clients.scratch()
    local server <close> = served.replay({
      "I should run it.\n</think>\n\nRunning it.\n\n" .. clients.call(shell,
        { { "command", "echo yes > made-by-agent" }, { "description", "Makes a file" } }),
      "It is there.\n</think>\n\nThe file is DONE." },
      { ctx = 65536, api_keys = { "none" }, template_variables = { enable_thinking = true } })
    local statuses = clients.statuses(server)
    local out = client.command(server, ("exec </dev/null; cd %s/proj; export HOME=%s/home %s; "
      .. "unset XDG_CONFIG_HOME XDG_DATA_HOME XDG_STATE_HOME XDG_CACHE_HOME\n%s\necho rc $?")
      :format(work.dir, work.dir, path(), set_up(work, server.url)))
    assert.matches("The file is DONE%.\n.*rc 0\n$", out)
    assert.equal("yes\n", work.read "proj/made-by-agent")
    assert.same({ 200, 200 }, statuses)
    return out
  end

  it("opencode: runs a command, sees what came of it, and answers", function()
    local out = makes_a_file("bash", function(work, url)
      local config, file = clients.documented("opencode", url)
      work.write("home/" .. file, config)
      return ("timeout 120 %s/opencode/node_modules/.bin/opencode run --title t --thinking "
        .. "'Make the file'"):format(clients.dir())
    end)
    assert.matches("I should run it.", out, 1, true)
  end)

  it("qwen-code: runs a command, sees what came of it, and answers", function()
    makes_a_file("run_shell_command", function(_, url)
      return ("qwen() { timeout 120 %s/qwen-code/node_modules/.bin/qwen \"$@\" -y "
        .. "-p 'Make the file'; }\n%s"):format(clients.dir(),
        (clients.documented("qwen-code", url)))
    end)
  end)
end)
