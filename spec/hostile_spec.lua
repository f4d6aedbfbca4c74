-- What clients and models write costs work that grows with its length, not with its square.

local label = require "moonlet.eval.label"
local place = require "moonlet.tools.place"
local prompt = require "moonlet.prompt"
local schema = require "moonlet.schema"
local trim = require "moonlet.trim"
local turn = require "moonlet.turn"
local work = require "spec.support.work"

local MOST <const> = 6 -- times the work for four times the text; 16 is its square

local function grows_with_text(n, make, fn, name)
  local growth = work.growth(n, make, fn)
  assert.is_true(growth < MOST, ("%s: %.1f"):format(name, growth))
end

describe("white space", function()
  it("takes steps that grow with the text to trim", function()
    local function inside(n) return "a" .. (" "):rep(n) .. "x" end
    local function around(n) return (" "):rep(n) .. "x" .. (" "):rep(n) end
    for _, make in ipairs { inside, around } do
      for name, fn in pairs(trim) do grows_with_text(4000, make, fn, name) end
    end
  end)
end)

describe("the name of a recipe", function()
  it("takes steps that grow with it to shorten", function()
    local function bare(n) return ("x"):rep(n) end
    local function with_end(n) return ("x"):rep(n) .. "/y.lua" end
    for name, make in pairs { bare = bare, ["with an end"] = with_end } do
      grows_with_text(20000, make, function(text) label.recipe(text, {}) end, name)
    end
    assert.equal("mine 4", label.recipe("a.b/mine.lua", { bits = 4 }))
    assert.equal("a/mine", label.recipe("a/mine", {}))
  end)
end)

local TOOLS <const> = { { type = "function", ["function"] = { name = "f", parameters = {
  type = "object", properties = { a = { type = "integer" }, b = { type = { "array", "null" } },
    c = { anyOf = { { type = "number" }, { type = "boolean" } } } } } } } }

local function in_call(inside) return "<tool_call>\n<function=f>\n" .. inside end

local function times(text, n) return text:rep(n // #text + 1) end

local TURNS <const> = {
  ["blanks in content"] = function(n) return "a" .. times(" ", n) .. "x" end,
  ["blanks in front"] = function(n) return times(" ", n) .. "x" end,
  ["blanks in reasoning"] = function(n)
    return "<think>a" .. times("\n", n) .. "x</think>" .. times(" ", n) .. "y"
  end,
  ["blanks in values"] = function(n)
    local space = times(" ", n)
    return in_call("<parameter=a>\nq" .. space .. "x\n</parameter>\n<parameter=b>\n" .. space
      .. "x\n</parameter>\n<parameter=c>\n1" .. space .. "x\n</parameter>\n</function>")
  end,
  ["blanks in names"] = function(n) return times("<function=a" .. times(" ", 200) .. "b>", n) end,
  ["opening brackets"] = function(n) return in_call("<parameter=b>\n" .. times("[", n)) end,
  ["<"] = function(n) return times("<", n) end,
  ["< in a call"] = function(n) return in_call(times("<", n)) end,
  ["closing tags"] = function(n) return times("</think>", n) end,
  ["names without an end"] = function(n) return times("<function=aaaaaaa", n) end,
  ["mentioned calls"] = function(n) return times("<tool_call> ", n) end,
  ["calls"] = function(n) return times(in_call "</function>\n</tool_call>", n) end,
}

describe("turns of hostile text are read in steps that grow with it:", function()
  for name, make in pairs(TURNS) do
    it(name, function()
      grows_with_text(1500, make, function(text) turn.read(text, { tools = TOOLS }) end, name)
      grows_with_text(400, make, function(text)
        local reader = turn.reader { tools = TOOLS, stream_arguments = true }
        for i = 1, #text, 16 do reader:feed(text:sub(i, i + 15)) end
        reader:finish()
      end, name .. " in pieces")
    end)
  end

  it("calls that never end", function()
    local function make(n) return times(in_call "<parameter=a>\n<parameter=z>\n", n) end
    grows_with_text(1500, make, function(text) turn.read(text, { tools = TOOLS }) end, "calls")
  end)

  it("objects that are no calls", function()
    for name, make in pairs {
      open = function(n) return times("<tool_call>{'", n) .. "</tool_call>" end,
      nested = function(n) return times('<tool_call>{"x":', n) .. times("}", n // 16) end,
    } do
      grows_with_text(800, make, function(text) turn.read(text) end, name)
    end
  end)
end)

describe("hostile text beside turns:", function()
  it("a schema that refers to itself many times", function()
    local function refers(n)
      local branches = {}
      for i = 1, n do branches[i] = { ["$ref"] = "#/$defs/a" } end
      return { ["$ref"] = "#/$defs/a", ["$defs"] = { a = { anyOf = branches } } }
    end
    grows_with_text(8, refers, function(node) schema.coerce("1", node) end, "references")
  end)

  it("one schema for many values", function()
    local branches = {}
    for i = 1, 200 do branches[i] = { const = "x" .. i } end
    local node = { type = "array", items = { anyOf = branches } }
    local list = "[" .. ('"1",'):rep(200) .. '"1"]'
    assert.is_true(work.steps(schema.coerce, list, node)
      < 3 * work.steps(schema.coerce, '["1"]', node) + 201 * 1000)
  end)

  it("turns of a conversation none of which ends in the second stop string", function()
    local tokenizer = { n_vocab = function() return 0 end, id = function() return 0 end,
      is_special = function() return true end,
      token_bytes = function(_, id) return ({ "<e>", "<never>" })[id] end }
    local model = { tokenizer = tokenizer, stop_ids = { 1, 2 } }
    function model.render(_, list, options)
      local text = {}
      for i, message in ipairs(list) do text[i] = "<a>\n" .. message.content .. "<e>" end
      return table.concat(text) .. (options.add_generation_prompt and "<a>\n" or "")
    end
    local looked = 0
    local find = string.find
    local prompts = prompt.new(model, require "moonlet.tokenizer".new_ids)
    prompts.strings = { "<a>" }
    prompts.turns.x = { ids = {}, text = "" }
    local list = require("moonlet.json").array {}
    for i = 1, 50 do list[i] = { role = "assistant", content = "word" } end
    finally(function() rawset(string, "find", find) end)
    rawset(string, "find", function(text, what, ...)
      if what == "<never>" then looked = looked + 1 end
      return find(text, what, ...)
    end)
    assert(prompts:make(list))
    assert.equal(1, looked)
  end)

  it("paths longer than the system takes", function()
    local here = assert(place.open("."))
    local path, message, code = here:resolve("a" .. ("/"):rep(5000) .. "b")
    assert.same({ nil, "a path has at most 4096 bytes", "range" }, { path, message, code })
    assert.truthy(here:resolve("a" .. ("/b"):rep(2000)))
  end)
end)
