-- OpenAI's Python SDK against scripted answers.

local client = require "spec.support.client"
local served = require "spec.support.served"

local CALL <const> = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
  .. "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"

describe("OpenAI's Python SDK #client", function()
  it("lists, chats, streams, calls tools and completes", function()
    local server <close> = served.replay { "Hello there.", CALL, CALL, "Hello there.",
      "Hello there." }
    local clients = assert(os.getenv("MOONLET_CLIENTS"), "see spec/client/setup.sh")
    local out = client.command(server, ("%s/venv/bin/python spec/client/openai_sdk.py %s/v1")
      :format(clients, server.url))
    assert.matches("ok\n$", out)
  end)
end)
