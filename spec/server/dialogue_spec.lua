-- What a dialogue of ten questions with tools costs: tokens that the model is given, request by
-- request, counted where the engine hands them to it.
--
-- Evaluated once means: all requests together give the model as many tokens as the last prompt and
-- its answer have. Where the template drops the reasoning of earlier questions, what follows the
-- question before is another text then and is read again, once, when the next question comes;
-- within a question nothing is, also where the client sends no reasoning back.

local client = require "spec.support.client"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local served = require "spec.support.served"

local TOOLS <const> = json.array { { type = "function", ["function"] = { name = "weather",
  description = "The weather in a city.", parameters = { type = "object", properties = {
    city = { type = "string" }, days = { type = "integer" } } } } } }

local CALL <const> = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
  .. "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"

describe("ten questions with tools", function()
  local model, server, n_evaluated
  setup(function() model = assert(moonlet.open(served.DIR, { threads = 1 })) end)
  teardown(function() model:close() end)
  after_each(function()
    model.start = nil
    server:close()
  end)

  local function open(answers, options)
    options = options or {}
    options.ctx = 4096
    server = served.forced(model, answers, options)
    n_evaluated = 0
    local start = model.start
    function model.start(self, parts)
      for _, part in ipairs(parts) do n_evaluated = n_evaluated + #part.ids end
      return start(self, parts)
    end
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

  -- Plays the dialogue; calls each(request) with what a request cost.
  local function play(fields, with_reasoning, each)
    local messages, prompts, length = json.array {}, served.prompts(server), 0
    for q = 1, 10 do
      messages[#messages + 1] = { role = "user", content = ("Question %d, please?"):format(q) }
      for step = 1, 2 do
        local before = n_evaluated
        local body = { messages = messages, tools = TOOLS, max_tokens = 100 }
        for name, value in pairs(fields) do body[name] = value end
        local reply = client.ask(server, "POST", "/v1/chat/completions", body)
        assert.equal(200, reply.status, reply.body)
        local message, usage = reply.json.choices[1].message, reply.json.usage
        assert.equal(step == 1, message.tool_calls ~= nil)
        each { question = q, step = step, prompt = prompts[#prompts], usage = usage,
          evaluated = n_evaluated - before, earlier = length }
        length = usage.prompt_tokens + usage.completion_tokens
        messages[#messages + 1] = kept(message, with_reasoning)
        if step == 1 then
          messages[#messages + 1] = { role = "tool", content = ("%d degrees"):format(10 + q),
            tool_call_id = message.tool_calls[1].id }
        end
      end
    end
    return length
  end

  local function nothing() end

  it("evaluate each token once without thinking", function()
    open { CALL, "It is warm there." }
    local length = play({ enable_thinking = false }, false, nothing)
    assert.equal(length, n_evaluated)
  end)

  it("evaluate each token once where thinking is kept", function()
    open { "I look.\n</think>\n\n" .. CALL, "I know.\n</think>\n\nIt is warm there." }
    local length = play({ enable_thinking = true, preserve_thinking = true }, true, nothing)
    assert.equal(length, n_evaluated)
  end)

  it("give reasoning back to those only who know the call", function()
    open { "I look.\n</think>\n\n" .. CALL, "It is warm there." }
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

  for _, sends in ipairs { true, false } do
    it("read again what follows the question before where thinking is dropped by the template"
      .. (sends and "" or " and the client"), function()
      open { "I look.\n</think>\n\n" .. CALL, "I know.\n</think>\n\nIt is warm there." }
      local reread = 0
      local length = play({ enable_thinking = true }, sends, function(r)
        local cost = r.evaluated - r.usage.completion_tokens
        if r.step == 2 then -- within a question: what is behind the end of the turn before
          assert.equal(r.usage.prompt_tokens - r.earlier, cost)
          assert.is_truthy(r.prompt:find("I look.", 1, true))
        elseif r.question > 1 then
          local _, stop = r.prompt:find(("Question %d, please?<|im_end|>\n"):format(r.question - 1),
            1, true)
          local n_before = #model:encode(r.prompt:sub(1, stop))
          assert.equal(r.usage.prompt_tokens - n_before, cost)
          reread = reread + r.earlier - n_before
        end
      end)
      assert.equal(n_evaluated, length + reread)
    end)
  end
end)
