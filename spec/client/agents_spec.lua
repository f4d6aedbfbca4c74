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
end)

-- As docs/server.md has it, with a key.
local OPENCODE <const> = [[{"model": "local/qwen3.6", "small_model": "local/qwen3.6",
  "provider": {"local": {"npm": "@ai-sdk/openai-compatible",
    "options": {"baseURL": "%s/v1", "apiKey": "key"},
    "models": {"qwen3.6": {"limit": {"context": 65536, "output": 8192}}}}}}]]

describe("agents over the chat API #client", function()
  -- `command` of an agent whose tool `shell` takes commands, in a folder of its own.
  local function makes_a_file(shell, config, command)
    local work <close> = clients.scratch()
    local server <close> = served.replay({
      "I should run it.\n</think>\n\nRunning it.\n\n" .. clients.call(shell,
        { { "command", "echo yes > made-by-agent" }, { "description", "Makes a file" } }),
      "It is there.\n</think>\n\nThe file is DONE." }, THINKS)
    local statuses = clients.statuses(server)
    if config then
      work.write("home/.config/opencode/opencode.json", config:format(server.url))
    end
    local out = client.command(server, ("cd %s/proj; timeout 120 env HOME=%s/home XDG_CONFIG_HOME= "
      .. "XDG_DATA_HOME= XDG_STATE_HOME= XDG_CACHE_HOME= OPENAI_BASE_URL=%s/v1 %s %s </dev/null; "
      .. "echo rc $?"):format(work.dir, work.dir, server.url, path(),
      command:format(clients.dir())))
    assert.matches("The file is DONE%.\n.*rc 0\n$", out)
    assert.equal("yes\n", work.read "proj/made-by-agent")
    assert.same({ 200, 200 }, statuses)
    return out
  end

  it("opencode: runs a command, sees what came of it, and answers", function()
    local out = makes_a_file("bash", OPENCODE,
      "%s/opencode/node_modules/.bin/opencode run --title t --thinking 'Make the file'")
    assert.matches("I should run it.", out, 1, true)
  end)

  it("qwen-code: runs a command, sees what came of it, and answers", function()
    makes_a_file("run_shell_command", nil, "OPENAI_API_KEY=key OPENAI_MODEL=qwen3.6 "
      .. "%s/qwen-code/node_modules/.bin/qwen --auth-type openai -y -p 'Make the file'")
  end)
end)
