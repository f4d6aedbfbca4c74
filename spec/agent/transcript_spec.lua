-- Conversations that are kept.

local json = require "moonlet.json"
local moonlet = require "moonlet"
local call = require("spec.support.said").call
local scripted = require "spec.support.scripted"
local workspace = require "spec.support.workspace"

local echo_tool = scripted.echo_tool
local open = scripted.open

describe("an agent", function()
  setup(scripted.begin)
  teardown(scripted.finish)

  describe("with a transcript", function()
    local place
    before_each(function() place = workspace.new() end)
    after_each(function() place.remove() end)

    it("goes on where an earlier one ended", function()
      local path = place.path "talk.jsonl"
      local first <close> = open({ "I look.\n\n" .. call("echo", { text = "hi" }), "It is hi." },
        { tools = { echo_tool() }, system = "Be brief.", save = path })
      assert(first:run("Look"))
      first:close()
      local second <close> = open({ "As I said." }, { tools = { echo_tool() }, resume = path })
      assert.same(json.encode(first.messages), json.encode(second.messages))
      assert.equal("As I said.", second:run("Again").text)
      second:close()
      local third <close> = open({ "Yes." }, { tools = { echo_tool() }, resume = path })
      assert.equal(7, #third.messages)
    end)

    it("says when it goes on with another model", function()
      local path, notes = place.path "talk.jsonl", {}
      local function on(event)
        if event.kind == "note" then notes[#notes + 1] = event.text end
      end
      open({ "Hello." }, { save = path }):close()
      open({ "Hello." }, { resume = path, on = on }):close()
      assert.same({}, notes)
      local file = assert(io.open(path, "rb"))
      local text = file:read("a"):gsub("demo%-model", "other")
      file:close()
      file = assert(io.open(path, "wb"))
      file:write(text)
      file:close()
      open({ "Hello." }, { resume = path, on = on }):close()
      assert.equal(1, #notes)
      assert.matches("kept with other and goes on with demo%-model", notes[1])
    end)

    it("drops half a line, and answers calls that were not", function()
      local path = place.path "talk.jsonl"
      local first <close> = open({ call("echo", { text = "hi" }), "Done." },
        { tools = { echo_tool() }, save = path })
      assert(first:run("Look"))
      first:close()
      local lines = {}
      for line in place.read("talk.jsonl"):gmatch("[^\n]+") do lines[#lines + 1] = line end
      assert.equal(5, #lines) -- head, user, call, result, answer
      place.write("talk.jsonl", table.concat(lines, "\n", 1, 3) .. "\n" .. lines[4]:sub(1, 10))
      local second <close> = open({ "Done." }, { tools = { echo_tool() }, resume = path })
      assert.equal("tool", second.messages[3].role)
      assert.equal("Error: the tool was interrupted", second.messages[3].content)
      assert.equal("Done.", second:run().text)
    end)

    it("stays as it was when a task cannot begin, however often it is tried", function()
      local path = place.path "talk.jsonl"
      local first <close> = open({ "Hello." }, { save = path })
      assert(first:run("Hi"))
      first:close()
      local kept = place.read "talk.jsonl"
      local told
      for _ = 1, 2 do
        local small <close> = open({ "Yes." }, { resume = path, ctx = 20 })
        local result, message, code = small:run("retry me")
        assert.is_nil(result)
        assert.equal("limit", code)
        assert.matches("^a prompt of %d+ tokens leaves no room in a context of 20: give it a "
          .. "larger one %(ctx, %-%-ctx%) or fewer messages %(transform_context%)$", message)
        assert.equal(told or message, message)
        told = message
        assert.equal(2, #small.messages)
        assert.equal(kept, place.read "talk.jsonl")
      end
      local hooked <close> = open({ "Yes." }, { resume = path,
        transform_context = function() error("no", 0) end })
      assert.has_error(function() hooked:run("retry me") end)
      assert.equal(kept, place.read "talk.jsonl")
      hooked:close()
      local short <close> = open({ "Yes." }, { resume = path, ctx = 20,
        transform_context = function(messages) return json.array { messages[#messages] } end })
      assert.equal("Yes.", assert(short:run("retry me")).text)
      local _, n = place.read("talk.jsonl"):gsub("retry me", "")
      assert.equal(1, n)
    end)

    it("refuses files that are none, are there already, or are in use", function()
      local function fails(pattern, options)
        options.model, options.replay = scripted.model, { "x" }
        local agent, message = moonlet.agent(options)
        assert.is_nil(agent)
        assert.matches(pattern, message)
      end
      place.write("other.jsonl", '{"role": "user"}\n')
      place.write("empty.jsonl", "")
      fails("other.jsonl:1: no transcript", { resume = place.path "other.jsonl" })
      fails("empty.jsonl: no transcript, not one line", { resume = place.path "empty.jsonl" })
      fails("none.jsonl", { resume = place.path "none.jsonl" })
      fails("other.jsonl", { save = place.path "other.jsonl" })
      local head = '{"moonlet_transcript": 1, "model": "x"}\n'
      local function said(more) return '{"role": "assistant", "content": "", ' .. more .. "}" end
      for _, line in ipairs { "{", "[]", "null", "", '{"role": "robot", "content": ""}',
        '{"role": "user"}', '{"role": "user", "content": 5}',
        '{"role": "tool", "content": ""}', '{"role": "tool", "content": "", "tool_call_id": null}',
        '{"role": "assistant", "content": "", "reasoning_content": 7}',
        said('"sampled": 3'), said('"sampled": {"text": "", "ids": ["a"]}'),
        said('"tool_calls": 5'), said('"tool_calls": null'), said('"tool_calls": [1]'),
        said('"tool_calls": [{"id": "a"}]'), said('"tool_calls": [{"id": "a", "function": 5}]'),
        said('"tool_calls": [{"function": {"name": "echo", "arguments": {}}}]'),
        said('"tool_calls": [{"id": 5, "function": {"name": "echo", "arguments": {}}}]'),
        said('"tool_calls": [{"id": "a", "function": {"name": "echo", "arguments": 1}}]') } do
        place.write("bad.jsonl", head .. line .. "\n")
        fails("bad.jsonl:2: ", { resume = place.path "bad.jsonl" })
        place.write("bad.jsonl", head .. '{"role": "user", "content": "Hi"}\n')
        open({ "x" }, { resume = place.path "bad.jsonl" }):close() -- nobody holds it
      end
      place.write("bad.jsonl", '{"moonlet_transcript": 2}\n')
      fails("another version", { resume = place.path "bad.jsonl" })
      local user <close> = open({ "x" }, { save = place.path "used.jsonl" })
      assert(user:run("Go"))
      fails("another process is writing it", { resume = place.path "used.jsonl" })
    end)

    it("takes no tokens that do not spell their turn, such as another model's", function()
      local first <close> = open({ "It is hi." }, { save = place.path "talk.jsonl" })
      assert(first:run("Look"))
      first:close()
      local function prompt_with(ids)
        local text, n = place.read("talk.jsonl"):gsub('"ids": ?%b[]', '"ids": ' .. ids)
        assert.equal(1, n)
        place.write("other.jsonl", text)
        local second <close> = open({ "As I said." }, { resume = place.path "other.jsonl" })
        return assert(second:run("Again")).usage.prompt
      end
      for _, ids in ipairs { "[1, 2, 3]", "[-1]", "[99999999]" } do
        assert.equal(prompt_with "[]", prompt_with(ids), ids)
      end
    end)
  end)
end)
