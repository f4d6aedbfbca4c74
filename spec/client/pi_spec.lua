-- The Pi coding agent against scripted answers: it reads, runs tools, and answers; and against the
-- demo model, which says what it likes.

local client = require "spec.support.client"
local clients = require "spec.support.clients"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local served = require "spec.support.served"

-- What Pi's users start from: nothing said about reasoning or roles.
local MODELS <const> = [[{"providers": {"local": {"baseUrl": "%s%s", "api": "%s",
  "apiKey": "none", "models": [{"id": "demo-model"}]}}}]]
local BASES <const> = { ["openai-completions"] = "/v1", ["openai-responses"] = "/v1",
  ["anthropic-messages"] = "" }

local call = clients.call

describe("Pi #client", function()
  local work
  before_each(function() work = clients.scratch() end)
  after_each(function() work.close() end)

  -- Output of pi with these arguments; the server is asked at most once per answer.
  local function run(server, model, arguments, n_answers)
    local statuses = clients.statuses(server)
    local out = client.command(server, ("cd %s/proj; timeout 60 env HOME=%s/home PI_OFFLINE=1 node "
      .. "%s/pi/node_modules/.bin/pi --offline --no-session --provider local --model %s "
      .. "%s </dev/null; echo rc $?"):format(work.dir, work.dir, clients.dir(), model, arguments))
    assert.equal(n_answers, #statuses, out)
    assert.matches("rc 0\n$", out)
    return out
  end

  local function pi(arguments, answers, options, api)
    local server <close> = served.replay(answers, options or { ctx = 32768 })
    api = api or "openai-completions"
    work.write("home/.pi/agent/models.json", MODELS:format(server.url, BASES[api], api))
    return run(server, "demo-model", arguments, #answers)
  end

  it("T1: answers", function()
    assert.matches("READY", pi('-p "Reply with the single word READY"', { "READY" }))
  end)

  it("T2: writes a file, in every dialect", function()
    for api in pairs(BASES) do
      pi('-p "Write hello.txt"', { call("write", { { "path", "hello.txt" },
        { "content", api } }), "Done." }, nil, api)
      assert.equal(api, work.read("proj/hello.txt"))
    end
  end)

  it("thinks, and writes a file, as docs/server.md sets it up", function()
    local server <close> = served.replay({ "I should write it.\n</think>\n\n" .. call("write",
      { { "path", "hello.txt" }, { "content", "hi" } }), "So.\n</think>\n\nDone." },
      { ctx = 32768, api_keys = { "none" } })
    local config, file = clients.documented("Pi", server.url)
    work.write("home/" .. file, config)
    local out = run(server, "qwen3.6", '--mode json --thinking high -p "Write hello.txt"', 2)
    assert.equal("hi", work.read("proj/hello.txt"))
    assert.matches('"thinking":"I should write it."', out, 1, true)
  end)

  it("T3: edits a file, with arguments that are lists of objects", function()
    work.write("proj/hello.txt", "hi\n")
    pi('-p "Edit hello.txt"', { "I shall edit it.\n" .. call("edit", { { "path", "hello.txt" },
      { "edits", '[{"oldText": "hi", "newText": "bye"}]' } }), "Done." })
    assert.equal("bye\n", work.read("proj/hello.txt"))
  end)

  it("T4: runs a command and reports events", function()
    local out = pi('--mode json -p "Run: echo 42"', { call("bash", { { "command", "echo 42" } }),
      "The output is 42." })
    local ended, tool, tokens = false, nil, 0
    for line in out:gmatch("(%b{})\n") do
      local event = json.decode(line)
      if event and event.type == "agent_end" then ended = true end
      if event and event.type == "tool_execution_end" then tool = event end
      if event and event.type == "message_end" and event.message.usage then
        tokens = math.max(tokens, event.message.usage.totalTokens)
      end
    end
    assert.is_true(ended)
    assert.is_false(tool.isError)
    assert.matches("42", json.encode(tool.result))
    assert.is_true(tokens > 0)
  end)

  it("T5: answers without tools", function()
    assert.matches("4", pi('--no-tools --thinking off -p "2+2?"', { "4" }))
  end)

  it("does not run a command that was cut off", function()
    local cut = call("bash", { { "command", "touch made-by-half-a-command" } })
    pi('-p "Run"', { { text = cut:sub(1, -45), finish_reason = "length" } })
    assert.is_nil(io.open(work.dir .. "/proj/made-by-half-a-command"))
  end)

  -- Ways in which models and servers have failed agents; spec/turn_spec.lua says where.
  it("is not stopped by what stopped it elsewhere", function()
    local content = "é 🙂\n</b> [1, None]"
    local write = call("write", { { "path", "a.txt" }, { "content", content } })
    for what, text in pairs {
      ["a call inside reasoning that is not closed"] = "I should write it.\n" .. write,
      ["text around calls"] = "x</think>\n\nFirst:\n" .. write .. "\nand\n" .. write .. "\nSo.",
      ["missing closing tags"] = "x</think>\n\n" .. write:gsub("\n</parameter>", "")
        :gsub("</tool_call>", ""),
      ["a missing opening tag"] = "x</think>\n\n" .. write:gsub("<tool_call>\n", ""),
      ["a closing tag twice"] = "x</think>\n\n" .. write:gsub("(\n</parameter>)", "%1%1"),
      ["parameters in another order"] = "x</think>\n\n" .. call("write",
        { { "content", content }, { "path", "a.txt" } }),
      ["a Hermes call"] = "x</think>\n\n<tool_call>\n" .. json.encode { name = "write",
        arguments = { path = "a.txt", content = content } } .. "\n</tool_call>",
    } do
      os.remove(work.dir .. "/proj/a.txt")
      local out = pi('-p "Write it"', { text, "x</think>\n\nDone." },
        { ctx = 32768, template_variables = { enable_thinking = true } })
      assert.equal(content, work.read("proj/a.txt"), what)
      assert.matches("Done", out, 1, true)
    end
  end)

  it("shows what the demo model says", function()
    local model <close> = assert(moonlet.open(served.DIR))
    local server <close> = served.model(model, { ctx = 4096, hooks = {
      on_request = function(request)
        request.temperature = 0
        return request
      end } })
    work.write("home/.pi/agent/models.json", MODELS:format(server.url, "/v1",
      "openai-completions"))
    for _, tools in ipairs { "", "--no-tools " } do
      local out = run(server, "demo-model", tools .. '-p "What is the capital of France?"', 1)
      assert.equal("The capital of France is Paris.\nrc 0\n", out)
    end
  end)

  it("sees that reasoning has taken everything", function()
    local out = pi('--mode json -p "Think"', { { text = "hm", finish_reason = "length" } },
      { ctx = 32768, template_variables = { enable_thinking = true } })
    assert.matches('"stopReason":"length"', out, 1, true)
    assert.matches('"thinking":"hm"', out, 1, true)
  end)
end)
