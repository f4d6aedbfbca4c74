-- Schemathesis reads /openapi.json, makes requests of it, good and bad ones, and checks every reply
-- against it.

local client = require "spec.support.client"
local moonlet = require "moonlet"
local served = require "spec.support.served"

local CALL <const> = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n"
  .. "</tool_call>"

describe("Schemathesis #client", function()
  local function run(server, n)
    local clients = assert(os.getenv("MOONLET_CLIENTS"), "see spec/client/setup.sh")
    local out = client.command(server, ("%s/venv/bin/schemathesis "
      .. "--config-file spec/client/schemathesis.toml run %s/openapi.json "
      .. "--checks not_a_server_error,status_code_conformance,content_type_conformance,"
      .. "response_headers_conformance,response_schema_conformance --exclude-path-regex '^/$' "
      .. "--max-examples %d --generation-deterministic --no-color "
      .. "--suppress-health-check all 2>&1; echo rc $?"):format(clients, server.url, n))
    assert.matches("rc 0\n$", out)
    assert.matches("Selected: 1%d", out)
  end

  it("finds nothing that scripted answers are not to say", function()
    local server <close> = served.replay({ "Hello.", CALL, "I think.</think>\n\nSo. " .. CALL },
      { ctx = 256 })
    run(server, 60)
  end)

  it("finds nothing that a model's answers are not to say", function()
    local model <close> = assert(moonlet.open(served.DIR, { threads = 2 }))
    local server <close> = served.model(model, { ctx = 64 })
    run(server, 20)
  end)
end)
