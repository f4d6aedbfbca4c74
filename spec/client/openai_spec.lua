-- OpenAI's Python SDK against scripted answers, and against the demo model.

local client = require "spec.support.client"
local clients = require "spec.support.clients"
local moonlet = require "moonlet"
local said = require "spec.support.said"
local served = require "spec.support.served"

local CALL <const> = said.CALL

describe("OpenAI's Python SDK #client", function()
  it("lists, chats, streams, calls tools and completes", function()
    local server <close> = served.replay { "Hello there.", CALL, CALL, "Hello there.",
      "Hello there." }
    local out = client.command(server, ("%s/venv/bin/python spec/client/openai_sdk.py %s/v1")
      :format(clients.dir(), server.url))
    assert.matches("ok\n$", out)
  end)

  it("has what the demo model says, whole and streamed", function()
    local model <close> = assert(moonlet.open(served.DIR))
    local server <close> = served.model(model)
    assert.equal("The capital of France is Paris.\n", client.command(server,
      ("%s/venv/bin/python spec/client/openai_demo.py %s/v1"):format(clients.dir(), server.url)))
  end)

  it("says what it is asked to in docs/server.md", function()
    local work <close> = clients.scratch()
    local server <close> = served.replay({ "Hello there." }, { api_keys = { "none" } })
    work.write("hello.py", (clients.documented("Python, OpenAI's SDK", server.url)))
    assert.matches("Hello there.", client.command(server, ("%s/venv/bin/python %s/hello.py")
      :format(clients.dir(), work.dir)), 1, true)
  end)
end)
