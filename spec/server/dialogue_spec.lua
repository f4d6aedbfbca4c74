-- What a dialogue of ten questions with tools costs: tokens that the model is given, counted where
-- the engine hands them to it.
--
-- Each of them once means: as many as there are different beginnings of the sequences that the
-- model had to know, which are the prompts with what was sampled behind them. Less is possible for
-- nobody. Where the template drops the thoughts of earlier questions, what follows the first of
-- them begins differently when the next question comes and has to be read, once.

local client = require "spec.support.client"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local served = require "spec.support.served"
local template = require "moonlet.template"

local TOOLS <const> = json.array { { type = "function", ["function"] = { name = "weather",
  description = "The weather in a city.", parameters = { type = "object", properties = {
    city = { type = "string" }, days = { type = "integer" } } } } } }

local CALL <const> = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
  .. "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
local HERMES_CALL <const> = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", '
  .. '"days": 3}}\n</tool_call>'
local LOOK <const>, KNOW <const> = "I look.\n</think>\n\n", "I know.\n</think>\n\n"
-- Of this model, with its logits. Of Qwen3.6-35B-A3B's, --cache-ram has room for sixteen unless it
-- is set.
local STATE <const> = 860160 + 4 * 4160
local NO_THOUGHT <const>, SAID <const> = "\n</think>\n\n", "It is warm there."

describe("ten questions with tools", function()
  local model, server, sequences, n_evaluated
  setup(function() model = assert(moonlet.open(served.DIR, { threads = 1 })) end)
  teardown(function() model:close() end)
  before_each(function() sequences, n_evaluated = {}, 0 end)
  after_each(function()
    model.start, model.render = nil, nil
    server:close()
  end)

  local function open(answers, options)
    options = options or {}
    options.ctx = 4096
    server = served.forced(model, answers, options)
    local start, submit = model.start, server.engine.submit
    function model.start(self, parts)
      for _, part in ipairs(parts) do n_evaluated = n_evaluated + #part.ids end
      return start(self, parts)
    end
    function server.engine.submit(engine, given)
      local ticket = assert(submit(engine, given))
      sequences[#sequences + 1] = { prompt = given.ids, ticket = ticket }
      return ticket
    end
  end

  -- How many different beginnings the sequences have.
  local function n_beginnings()
    local tree, n = {}, 0
    for _, sequence in ipairs(sequences) do
      local at = tree
      for _, ids in ipairs { sequence.prompt, sequence.ticket.generation.ids } do
        for _, id in ipairs(ids) do
          if not at[id] then at[id], n = {}, n + 1 end
          at = at[id]
        end
      end
    end
    return n
  end

  -- The message as a client keeps it: arguments read as JSON and spelled its own way.
  local function kept(message, with_reasoning)
    local calls = message.tool_calls and json.array {}
    for i, call in ipairs(message.tool_calls or {}) do
      local given = json.decode(call["function"].arguments)
      calls[i] = { id = call.id, type = "function", ["function"] = { name = "weather",
        arguments = json.encode(json.object({ days = given.days, city = given.city },
          { "days", "city" }), { separators = { ",", ":" } }) } }
    end
    return { role = "assistant", content = message.content, tool_calls = calls,
      reasoning_content = with_reasoning and message.reasoning_content or nil }
  end

  -- Plays the dialogue: each question takes as many requests as there are answers. Returns how
  -- many tokens the last prompt and its answer have.
  local function play(fields, with_reasoning, n_steps)
    local messages, usage = json.array {}, nil
    for q = 1, 10 do
      messages[#messages + 1] = { role = "user", content = ("Question %d, please?"):format(q) }
      for step = 1, n_steps do
        local body = { messages = messages, tools = TOOLS, max_tokens = 100 }
        for name, value in pairs(fields) do body[name] = value end
        local reply = client.ask(server, "POST", "/v1/chat/completions", body)
        assert.equal(200, reply.status, reply.body)
        local message = reply.json.choices[1].message
        usage = reply.json.usage
        assert.equal(step < n_steps, message.tool_calls ~= nil)
        messages[#messages + 1] = kept(message, with_reasoning)
        if step < n_steps then
          messages[#messages + 1] = { role = "tool", content = ("%d degrees"):format(10 * q + step),
            tool_call_id = message.tool_calls[1].id }
        end
      end
    end
    return usage.prompt_tokens + usage.completion_tokens
  end

  -- The demo model's template with calls as JSON, which is how Hermes models have them.
  local function speak_hermes()
    local source = model.template.source
    local first = source:find("{%- macro call_of(call) -%}", 1, true)
    local _, last = source:find("{%- endmacro -%}", first, true)
    local hermes = assert(template.new(source:sub(1, first - 1) .. "{%- macro call_of(call) -%}"
      .. "{{- '<tool_call>\\n' ~ ({'name': call.function.name, 'arguments': "
      .. "call.function.arguments})|tojson ~ '\\n</tool_call>' -}}" .. source:sub(last - 15)))
    function model.render(_, ...) return hermes:render(...) end
  end

  local THINK <const>, KEEP <const> = { enable_thinking = true },
    { enable_thinking = true, preserve_thinking = true }

  for name, case in pairs {
    ["without thinking"] = { { enable_thinking = false }, { CALL, SAID } },
    ["where the same is sampled in several ways"] = { { enable_thinking = false },
      { CALL, SAID, "\n" .. CALL, SAID .. "\n", "Well. " .. CALL, "\n" .. SAID }, n_steps = 2 },
    ["where thinking is kept"] = { KEEP, { LOOK .. CALL, KNOW .. SAID }, sends = true },
  } do
    it("give the model each token once, and are one sequence, " .. name, function()
      open(case[2])
      local length = play(case[1], case.sends, case.n_steps or #case[2])
      assert.equal(n_beginnings(), n_evaluated)
      assert.equal(length, n_evaluated)
    end)
  end

  for name, case in pairs {
    ["it"] = { LOOK .. CALL, KNOW .. SAID, sends = true, cache_bytes = 16 * STATE },
    ["it, and the client, too"] = { LOOK .. CALL, KNOW .. CALL, KNOW .. SAID },
    ["what not every call begins with"] = { NO_THOUGHT .. CALL, LOOK .. CALL:gsub("Oslo", "Rome"),
      KNOW .. SAID, sends = true },
    ["it, where calls are JSON"] = { LOOK .. HERMES_CALL, KNOW .. SAID, is_hermes = true },
  } do
    it("give the model each token once where the template drops thinking: " .. name, function()
      if case.is_hermes then speak_hermes() end
      open(case, { cache_bytes = case.cache_bytes })
      local length = play(THINK, case.sends, #case)
      assert.equal(n_beginnings(), n_evaluated)
      assert.is_true(n_evaluated > length)
    end)
  end

  it("give reasoning back to those only who know the call", function()
    open { LOOK .. CALL, SAID }
    local prompts = served.prompts(server)
    local messages = json.array { { role = "user", content = "Question?" } }
    local message = client.ask(server, "POST", "/v1/chat/completions", { messages = messages,
      tools = TOOLS, max_tokens = 100, enable_thinking = true }).json.choices[1].message
    messages[2] = kept(message, false)
    messages[3] = { role = "tool", content = "11 degrees", tool_call_id = "x" }
    for _, id in ipairs { message.tool_calls[1].id, "call_0" } do
      messages[2].tool_calls[1].id = id
      client.ask(server, "POST", "/tokenize", { messages = messages, tools = TOOLS,
        chat_template_kwargs = { enable_thinking = true } })
      assert.equal(id ~= "call_0", prompts[#prompts]:find("I look.", 1, true) ~= nil)
    end
  end)
end)
