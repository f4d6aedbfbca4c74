-- The Responses API of OpenAI's Python SDK, and codex, against scripted answers.

local client = require "spec.support.client"
local clients = require "spec.support.clients"
local said = require "spec.support.said"
local served = require "spec.support.served"

describe("OpenAI's Python SDK, responses #client", function()
  it("answers, streams, reasons, calls tools", function()
    local looks = "I think.\n</think>\n\nLet me look.\n\n" .. said.CALL
    local server <close> = served.replay({ "Hello there.", looks, looks,
      "Sunny, then.\n</think>\n\nHello there.", "Hello there.",
      { text = "some", finish_reason = "error", message = "bad weight" } },
      { api_keys = { "key" } })
    local out = client.command(server, ("%s/venv/bin/python spec/client/responses_sdk.py %s/v1")
      :format(clients.dir(), server.url))
    assert.matches("ok\n$", out)
  end)
end)

describe("codex #client", function()
  local function makes_a_file(key, more)
    local work <close> = clients.scratch()
    local server <close> = served.replay({
      "I should run it.\n</think>\n\nRunning it.\n\n" .. clients.call("exec_command",
        { { "cmd", "echo yes > made-by-codex" } }),
      "It is there.\n</think>\n\nThe file is DONE." },
      { ctx = 65536, api_keys = { key }, template_variables = { enable_thinking = true } })
    local config, file = clients.documented("codex", server.url)
    work.write("home/" .. file, config .. more)
    local statuses = clients.statuses(server)
    local out = client.command(server, ("cd %s/proj; timeout 90 env HOME=%s/home MOONLET_KEY=%s "
      .. "%s/agents/node_modules/.bin/codex exec --skip-git-repo-check -s danger-full-access "
      .. "'Make the file' </dev/null; echo rc $?"):format(work.dir, work.dir, key or "",
      clients.dir()))
    assert.matches("The file is DONE.\nrc 0\n$", out)
    assert.matches("\nI should run it.\n", out, 1, true)
    assert.equal("yes\n", work.read "proj/made-by-codex")
    assert.same({ 200, 200 }, statuses)
  end

  it("runs a command, sees what came of it, and answers", function() makes_a_file(nil, "") end)

  it("takes a key from the variable that its configuration names", function()
    makes_a_file("key", 'env_key = "MOONLET_KEY"\n')
  end)
end)
