-- Anthropic's Python SDK and Claude Code against scripted answers.

local client = require "spec.support.client"
local clients = require "spec.support.clients"
local said = require "spec.support.said"
local served = require "spec.support.served"

describe("Anthropic's Python SDK #client", function()
  it("chats, streams, thinks, calls tools and counts", function()
    local looks = "I think.\n</think>\n\nLet me look.\n\n" .. said.CALL
    local server <close> = served.replay({ "Hello there.", looks, looks, "Hello there.",
      { text = "some", finish_reason = "error", message = "bad weight" } },
      { api_keys = { "key" } })
    local out = client.command(server, ("%s/venv/bin/python spec/client/anthropic_sdk.py %s")
      :format(clients.dir(), server.url))
    assert.matches("ok\n$", out)
  end)

  it("says what it is asked to in docs/server.md", function()
    local work <close> = clients.scratch()
    local server <close> = served.replay({ "Hello there." }, { api_keys = { "none" } })
    work.write("hello.py", (clients.documented("Python, Anthropic's SDK", server.url)))
    assert.matches("Hello there.", client.command(server, ("%s/venv/bin/python %s/hello.py")
      :format(clients.dir(), work.dir)), 1, true)
  end)
end)

describe("Claude Code #client", function()
  it("runs a command, sees what came of it, and answers", function()
    local work <close> = clients.scratch()
    local server <close> = served.replay({
      "I should run it.\n</think>\n\nRunning it.\n\n" .. clients.call("Bash",
        { { "command", "touch made-by-claude" }, { "description", "Make a file" } }),
      "It is there.\n</think>\n\nThe file is DONE." }, { ctx = 65536, api_keys = { "none" } })
    local statuses = clients.statuses(server)
    local out = client.command(server, ("exec </dev/null; cd %s/proj; export HOME=%s/home\n"
      .. "claude() { timeout 60 %s/agents/node_modules/.bin/claude \"$@\" "
      .. "-p 'Run touch made-by-claude' --allowedTools 'Bash(touch:*)'; }\n%s\necho rc $?")
      :format(work.dir, work.dir, clients.dir(),
      (clients.documented("Claude Code", server.url))))
    assert.matches("The file is DONE.\nrc 0\n$", out)
    assert.equal("", work.read "proj/made-by-claude")
    assert.same({ 200, 200 }, statuses)
  end)
end)
