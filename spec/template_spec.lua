local json = require "moonlet.json"
local template = require "moonlet.template"

local function write(path, text)
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
end

local function render(source, messages, options)
  return assert(template.new(source)):render(messages, options)
end

describe("template.render", function()
  it("defines tools and documents as none when they are not given", function()
    assert.equal("None None True", render("{{ tools }} {{ documents }} {{ tools is defined }}", {}))
  end)

  it("asks for a generation prompt unless told otherwise", function()
    local source = "{{ add_generation_prompt }}"
    assert.equal("True", render(source, {}))
    assert.equal("False", render(source, {}, { add_generation_prompt = false }))
  end)

  it("passes every other option on and leaves absent ones undefined", function()
    local source = "{{ enable_thinking is defined }}{{ enable_thinking }}"
    assert.equal("False", render(source, {}))
    assert.equal("TrueFalse", render(source, {}, { enable_thinking = false }))
  end)

  it("takes plain tables and decoded JSON alike", function()
    local source = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
      .. "{{ tools|tojson }}"
    local tools = assert(json.decode('[{"type": "function", "function": {"b": 1.0, "a": []}}]'))
    local want = 'user=hi;[{"type": "function", "function": {"b": 1.0, "a": []}}]'
    assert.equal(want, render(source, { { role = "user", content = "hi" } }, { tools = tools }))
    local messages = assert(json.decode('[{"role": "user", "content": "hi"}]'))
    assert.equal(want, render(source, messages, { tools = tools }))
  end)

  it("reads an empty list of messages as a list", function()
    assert.equal("[] 0", render("{{ messages }} {{ messages|length }}", {}))
  end)

  it("copies reasoning to the names templates read and leaves the caller's table alone", function()
    local source = "{% for m in messages %}{{ m }};{% endfor %}"
    local message = { role = "assistant", content = "x", reasoning = "why" }
    assert.equal("{'thinking': 'why', 'content': 'x', 'reasoning': 'why', 'role': 'assistant',"
      .. " 'reasoning_content': 'why'};", render(source, { message }))
    assert.same({ role = "assistant", content = "x", reasoning = "why" }, message)
  end)

  it("gives back what the template raises, word for word", function()
    local text, message, code = render("{{ raise_exception('No user\nquery') }}", {})
    assert.is_nil(text)
    assert.equal("No user\nquery", message)
    assert.equal("template", code)
  end)

  it("names the template and the line of other failures", function()
    local chat = assert(template.new("a\nb\n{{ nope.x }}", { name = "chat_template.jinja" }))
    local text, message = chat:render({})
    assert.is_nil(text)
    assert.equal("chat_template.jinja:3: 'nope' is undefined", message)
    text, message = template.new("a\n{% if %}", { name = "f" })
    assert.is_nil(text)
    assert.equal("f:2: Expected an expression, got 'end of statement block'", message)
  end)

  it("raises on misuse", function()
    assert.has_error(function() template.new("x", { nme = "y" }) end)
    assert.has_error(function() assert(template.new("x")):render("hi") end)
  end)

  it("refuses messages of the wrong shape", function()
    local _, message, code = render("x", { "hi" })
    assert.equal("messages[0] must be an object", message)
    assert.equal("template", code)
    _, message = render("x", { role = "user" })
    assert.equal("messages must be a list", message)
  end)
end)

describe("template.open", function()
  local dir

  before_each(function()
    dir = os.tmpname()
    os.remove(dir)
    assert(os.execute("mkdir -p '" .. dir .. "/additional_chat_templates'"))
  end)

  after_each(function()
    os.execute("rm -r '" .. dir .. "'")
  end)

  local function load_and_render(options)
    return assert(template.open(dir)):render({}, options)
  end

  it("prefers chat_template.jinja to the configuration", function()
    write(dir .. "/tokenizer_config.json", '{"chat_template": "config"}')
    assert.equal("config", load_and_render())
    write(dir .. "/chat_template.json", '{"chat_template": "processor"}')
    assert.equal("processor", load_and_render())
    write(dir .. "/chat_template.jinja", "file")
    assert.equal("file", load_and_render())
  end)

  it("takes the template for tools when there are tools", function()
    write(dir .. "/tokenizer_config.json", [[{"chat_template": [
      {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]}]])
    assert.equal("plain", load_and_render())
    assert.equal("tools", load_and_render({ tools = { { name = "f" } } }))
    write(dir .. "/chat_template.jinja", "file")
    write(dir .. "/additional_chat_templates/tool_use.jinja", "tool file")
    assert.equal("file", load_and_render({ tools = json.null }))
    assert.equal("tool file", load_and_render({ tools = { { name = "f" } } }))
  end)

  it("passes special tokens, which options override", function()
    write(dir .. "/tokenizer_config.json", [[{"bos_token": null, "eos_token": "<e>",
      "pad_token": {"content": "<p>", "special": true}, "image_token": "<i>",
      "add_bos_token": true, "extra_special_tokens": {"audio_token": "<a>"}}]])
    write(dir .. "/chat_template.jinja", "{{ bos_token is defined }}{{ add_bos_token is defined }}"
      .. "{{ eos_token }}{{ pad_token }}{{ image_token }}{{ audio_token }}")
    assert.equal("FalseFalse<e><p><i><a>", load_and_render())
    assert.equal("FalseFalse!<p><i><a>", load_and_render({ eos_token = "!" }))
  end)

  it("says what is missing or broken in one line", function()
    local _, message, code = template.open(dir)
    assert.equal(dir .. ": no chat template (chat_template.jinja or chat_template in"
      .. " tokenizer_config.json)", message)
    assert.equal("missing", code)
    write(dir .. "/tokenizer_config.json", '{"chat_template": [{"name": 1}]}')
    _, message, code = template.open(dir)
    assert.equal(dir .. "/tokenizer_config.json: chat_template[0] has no name and template",
      message)
    assert.equal("format", code)
    write(dir .. "/chat_template.jinja", "\n{% for %}")
    _, message, code = template.open(dir)
    assert.equal(dir .. "/chat_template.jinja:2: Expected an expression, got"
      .. " 'end of statement block'", message)
    assert.equal("template", code)
  end)

  it("renders with the template of the demo model", function()
    local chat = assert(template.open("examples/demo-model"))
    local prompt = assert(chat:render({ { role = "user", content = "Hi" } }))
    assert.truthy(prompt:find("<|im_start|>user\nHi<|im_end|>\n", 1, true), prompt)
  end)
end)
