-- Perplexity against its definition, computed here from the logits of whole forward passes.
local golden = require "spec.support.golden"
local json = require "moonlet.json"
local moonlet = require "moonlet"

local TEXT <const> = "The old fisherman looked at the sea.\nHe had caught nothing for a week, "
  .. "and the wind was turning; still he went down to the boat."

describe("perplexity", function()
  local model
  lazy_setup(function()
    model = assert(moonlet.open("examples/demo-model", { threads = 2, precision = "exact" }))
  end)
  lazy_teardown(function() model:close() end)

  -- -ln p of ids[from..to], each given all before it.
  local function nll_of(ids, from, to)
    local logits <close> = assert(model:forward(ids)).logits
    local sum = 0
    for i = from, to do sum = sum - logits:row(i - 1):logprob(ids[i]) end
    return sum
  end

  local function with_file(lines, fn)
    local path = os.tmpname()
    local file = assert(io.open(path, "w"))
    for _, line in ipairs(lines) do
      file:write(type(line) == "string" and line or json.encode(line), "\n")
    end
    file:close()
    local ok, problem = pcall(fn, path)
    os.remove(path)
    assert(ok, problem)
  end

  local function perplexity(dialogues)
    local result
    with_file(dialogues, function(path)
      result = assert(moonlet.eval.perplexity(model, { chat = path }))
    end)
    return result
  end

  local function turn(role, content, rest)
    local message = rest or {}
    message.role, message.content = role, content
    return message
  end

  -- The answer's nll and token count by the definition, from the two texts around it.
  local function scored(prompt, answer)
    local ids = assert(model:encode(prompt))
    local n_prompt, own = #ids, assert(model:encode(answer))
    table.move(own, 1, #own, n_prompt + 1, ids)
    return nll_of(ids, n_prompt + 1, #ids), #own
  end

  describe("of a text", function()
    it("scores all tokens of a window but its first", function()
      local ids = assert(model:encode(TEXT, { special = false }))
      assert.is_true(#ids > 20)
      local result = assert(moonlet.eval.perplexity(model, { text = TEXT }))
      local nll = nll_of(ids, 2, #ids)
      assert.near(nll, result.nll, 1e-4 * nll)
      assert.equal(#ids - 1, result.tokens)
      assert.equal(26, result.words)
      assert.near(math.exp(result.nll / result.tokens), result.perplexity, 1e-9)
      assert.near(math.exp(result.nll / 26), result.word_perplexity, 1e-9)
    end)

    it("counts the words of windows as those of one text", function()
      local ids = assert(model:encode(TEXT, { special = false }))
      for _, window in ipairs { 2, 3, 7, #ids - 1 } do
        for _, range in ipairs { { 1 }, { 1, 999 } } do
          assert.equal(26, assert(moonlet.eval.perplexity(model, { text = TEXT, window = window,
            windows = range })).words)
        end
      end
      local some = assert(moonlet.eval.perplexity(model, { text = TEXT, window = 3,
        windows = { 2, 4 } }))
      local words = select(2, model:decode(table.move(ids, 4, 12, 1, {})):gsub("%S+", ""))
      assert.equal(words, some.words)
    end)

    it("starts every window from nothing", function()
      local ids = assert(model:encode(TEXT, { special = false }))
      for _, window in ipairs { 2, 7, #ids - 1, #ids, #ids + 1 } do
        local nll, tokens = 0, 0
        for first = 1, #ids, window do
          local piece = table.move(ids, first, math.min(first + window - 1, #ids), 1, {})
          if #piece > 1 then nll = nll + nll_of(piece, 2, #piece) end
          tokens = tokens + #piece - 1
        end
        local result = assert(moonlet.eval.perplexity(model, { text = TEXT, window = window }))
        assert.equal(tokens, result.tokens)
        assert.near(nll, result.nll, 1e-4 * nll)
      end
    end)

    it("follows the protocol of the cards: the first tokens, in one piece", function()
      local ids = assert(model:encode(TEXT, { special = false }))
      local nll = nll_of(ids, 2, 20)
      local words = select(2, model:decode(table.move(ids, 1, 20, 1, {})):gsub("%S+", ""))
      local result = assert(moonlet.eval.perplexity(model, { text = TEXT, protocol = "card",
        tokens = 20 }))
      assert.same({ 19, words }, { result.tokens, result.words })
      assert.is_nil(result.notes)
      assert.near(nll, result.nll, 1e-4 * nll)
      assert.near(math.exp(result.nll / words), result.word_perplexity, 1e-9)
      -- more than there are
      result = assert(moonlet.eval.perplexity(model, { text = TEXT, protocol = "card",
        tokens = 1000 }))
      assert.same({ ("protocol card was to take 1000 tokens, the text has %d"):format(#ids) },
        result.notes)
      result.notes = nil
      assert.same(assert(moonlet.eval.perplexity(model, { text = TEXT })), result)
    end)

    it("does not depend on the pieces in which long texts are evaluated", function()
      local long = (TEXT .. "\n"):rep(70)
      local ids = assert(model:encode(long, { special = false }))
      assert.is_true(#ids > 2048 and #ids < 4096)
      local result = assert(moonlet.eval.perplexity(model, { text = long, protocol = "card",
        tokens = #ids }))
      local session <close> = assert(model:session { ctx = #ids })
      local targets = table.move(ids, 2, #ids, 1, {})
      targets[#ids] = -1
      local sum = 0
      for _, v in ipairs(golden.floats(session:score(ids, targets))) do sum = sum + v end
      assert.near(sum, result.nll, 1e-9 * sum)
    end)

    it("reads a file and reports progress", function()
      local seen = {}
      with_file({ TEXT }, function(path)
        local result = assert(moonlet.eval.perplexity(model, { file = path, window = 16,
          on_progress = function(done, total) seen[#seen + 1] = { done, total } end }))
        local same = assert(moonlet.eval.perplexity(model, { text = TEXT .. "\n", window = 16 }))
        assert.same(same, result)
      end)
      assert.is_true(#seen > 1)
      assert.equal(seen[#seen][1], seen[#seen][2])
    end)
  end)

  describe("of dialogues", function()
    it("scores what the assistant says, its end token included", function()
      local messages = { turn("user", "What is the capital of France?"),
        turn("assistant", "The capital of France is Paris.") }
      local prompt = assert(model:render({ messages[1] }))
      local nll, n = scored(prompt, "The capital of France is Paris.<|im_end|>")
      local result = perplexity { { messages = messages } }
      assert.equal(n, result.tokens)
      assert.near(nll, result.nll, 1e-4 * nll)
    end)

    it("names the one that is too long for the model", function()
      local long = { messages = { turn("user", "What?"), turn("assistant", ("word "):rep(5000)) } }
      local short = { messages = { turn("user", "What?"), turn("assistant", "That.") } }
      with_file({ short, long }, function(path)
        local result, message, code = moonlet.eval.perplexity(model, { chat = path })
        assert.is_nil(result)
        assert.equal(path .. ": dialogue 2: 5017 tokens in a row, the model takes 4096", message)
        assert.equal("range", code)
      end)
    end)

    it("scores every turn in the context it was given in", function()
      local messages = { turn("user", "What is the capital of France?"),
        turn("assistant", "The capital of France is Paris."), turn("user", "And of Italy?"),
        turn("assistant", "Rome.") }
      local first, n1 = scored(assert(model:render({ messages[1] })),
        "The capital of France is Paris.<|im_end|>")
      local before = json.array { messages[1], messages[2], messages[3] }
      local second, n2 = scored(assert(model:render(before)), "Rome.<|im_end|>")
      local result = perplexity { { messages = messages } }
      assert.equal(n1 + n2, result.tokens)
      assert.near(first + second, result.nll, 1e-4 * (first + second))
    end)

    it("scores reasoning and tool calls, not what tools answer", function()
      local call = { type = "function", ["function"] = { name = "calculator",
        arguments = { expression = "2 + 2" } } }
      local messages = { turn("user", "Use the calculator: 2 + 2"),
        turn("assistant", "", { reasoning_content = "I should use the calculator.",
          tool_calls = { call } }), turn("tool", "4"), turn("assistant", "4") }
      local open = assert(model:render({ messages[1] }, { enable_thinking = true }))
      local first, n1 = scored(open, "I should use the calculator.\n</think>\n\n<tool_call>\n"
        .. "<function=calculator>\n<parameter=expression>\n2 + 2\n</parameter>\n</function>\n"
        .. "</tool_call><|im_end|>")
      local before = json.array { messages[1], messages[2], messages[3] }
      local second, n2 = scored(assert(model:render(before)), "4<|im_end|>")
      local result = perplexity { { messages = messages } }
      assert.equal(n1 + n2, result.tokens)
      assert.near(first + second, result.nll, 1e-4 * (first + second))
    end)

    it("hands tools and variables to the template", function()
      local tools = { { type = "function", ["function"] = { name = "add", parameters = {} } } }
      local messages = { turn("user", "Hi"), turn("assistant", "Hello!") }
      local prompt = assert(model:render({ messages[1] }, { tools = tools }))
      local nll, n = scored(prompt, "Hello!<|im_end|>")
      local result = perplexity { { messages = messages, tools = tools } }
      assert.equal(n, result.tokens)
      assert.near(nll, result.nll, 1e-4 * nll)
    end)

    it("cuts no control string where a template shows less than it prompted with", function()
      local checkpoint = require "spec.support.checkpoint"
      local dir = checkpoint.directory()
      os.execute(("ln -s $PWD/examples/demo-model/* %s && rm %s/chat_template.jinja"):format(
        dir, dir))
      checkpoint.spit(dir .. "/chat_template.jinja", "{% for m in messages %}{{ m.content }}"
        .. "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<think>{% endif %}")
      local other <close> = assert(moonlet.open(dir, { precision = "exact" }))
      checkpoint.remove(dir)
      local result
      with_file({ { messages = { turn("user", "Hi"), turn("assistant", "<tool_call>x") } } },
        function(path) result = assert(moonlet.eval.perplexity(other, { chat = path })) end)
      local nll, n = scored("Hi<|im_end|>\n", "<tool_call>x<|im_end|>")
      assert.equal(n, result.tokens)
      assert.near(nll, result.nll, 1e-4 * nll)
    end)

    it("adds up over lines", function()
      local one = { messages = { turn("user", "Hi"), turn("assistant", "Hello!") } }
      local two = { messages = { turn("user", "What is 1 + 1?"), turn("assistant", "2") } }
      local a, b, both = perplexity { one }, perplexity { two }, perplexity { one, "", two }
      assert.near(a.nll + b.nll, both.nll, 1e-5)
      assert.equal(a.tokens + b.tokens, both.tokens)
      assert.equal(a.words + b.words, both.words)
    end)
  end)

  describe("refuses", function()
    local function fails(code, pattern, opts)
      local result, message, got = moonlet.eval.perplexity(model, opts)
      assert.is_nil(result)
      assert.equal(code, got)
      assert.matches(pattern, message)
    end

    it("what cannot be read or scored", function()
      fails("io", "no/such/file", { file = "no/such/file" })
      fails("io", "spec", { file = "spec" })
      fails("io", "spec", { chat = "spec" })
      fails("range", "^the text: fewer than two tokens", { text = "" })
      with_file({ '{"messages": 3}' }, function(path)
        fails("format", ":1: ", { chat = path })
      end)
      with_file({ { messages = { turn("user", "Hi") } }, "{" }, function(path)
        fails("format", ":2: ", { chat = path })
      end)
      with_file({ { messages = { turn("user", "Hi") } } }, function(path)
        fails("range", path .. ": no assistant says anything in it", { chat = path })
      end)
      with_file({ { messages = { turn("wizard", "Hi"), turn("assistant", "Hi") } } },
        function(path) fails("template", "dialogue 1: .*wizard", { chat = path }) end)
    end)

    it("misuse, by raising", function()
      for _, opts in ipairs { {}, { text = "a", file = "b" }, { text = "a", window = 1 },
        { txt = "a" }, { text = "a", protocol = "card" }, { text = "a", tokens = 4 },
        { text = "a", protocol = "cards", tokens = 4 }, { text = "a", protocol = "card",
        tokens = 1 }, { chat = "a", protocol = "card", tokens = 4 }, { text = "a",
        protocol = "card", tokens = 4, window = 8 } } do
        assert.error(function() moonlet.eval.perplexity(model, opts) end)
      end
    end)
  end)
end)
