-- The chat page in headless Chromium: what people do with it, and what a model could do to it.

local client = require "spec.support.client"
local served = require "spec.support.served"

local CALL <const> = "<tool_call>\n<function=weather>\n<parameter=city>\n<u>Paris</u>\n"
  .. "</parameter>\n</function>\n</tool_call>"
local CHAT <const> = [[I ponder <i>deeply</i>.</think>

Hello, this is **bold**.

- one
- two

```html
<script>document.title = 1</script>
```
<img src=x onerror=document.title=2>
The end.]]

describe("the chat page in Chromium #client", function()
  local function visit(scenario, answers, options)
    local server <close> = served.replay(answers, options)
    local clients = assert(os.getenv("MOONLET_CLIENTS"), "see spec/client/setup.sh")
    local out = client.command(server, ("%s/venv/bin/python spec/client/page.py %s/ %s %s 2>&1")
      :format(clients, server.url, scenario, os.getenv("MOONLET_SCREENSHOTS") or ""))
    assert.matches("ok\n$", out)
    assert.is_nil(next(server.exchanges))
  end

  it("streams, folds reasoning, and shows markup as text", function()
    visit("chat", { { text = CHAT, delay_ms = 30 } })
  end)

  it("shows a tool call and sends its result back", function()
    visit("tools", { CALL, "It is sunny." })
  end)

  it("stops an answer", function()
    local long = { text = "one " .. ("and on "):rep(500) .. "hundred", delay_ms = 20 }
    visit("stop", { long, long, "Done." })
  end)

  it("shows errors", function()
    visit("errors", { { text = "It st", finish_reason = "error", message = "broken weight" } })
  end)

  it("asks for a key and keeps it", function()
    visit("key", { "Open." }, { api_keys = { "secret" } })
  end)
end)
