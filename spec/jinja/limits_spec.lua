-- Templates come with checkpoints, so a hostile one must fail with one line, soon and in little
-- memory.

local jinja = require "moonlet.jinja"

local function render(source, context)
  local template, message, code, detail = jinja.compile(source)
  if not template then return nil, message, code, detail end
  return template:render(context)
end

local function refuses(source, wanted, context)
  local text, message, code = render(source, context)
  assert.is_nil(text)
  assert.equal("template", code)
  assert.truthy(message:find(wanted, 1, true), message)
  assert.is_nil(message:find("\n", 1, true))
  assert.is_nil(message:find(".lua:", 1, true))
end

describe("jinja limits", function()
  it("size of texts and lists", function()
    refuses("{{ 'x' * 10 ** 9 }}", "text is too long")
    refuses("{{ [0] * 10 ** 9 }}", "list is too long")
    refuses("{{ '%999999999d' % 1 }}", "text is too long")
    refuses("{{ '{:999999999}'.format(1) }}", "text is too long")
    refuses("{{ 'x'|center(999999999) }}", "text is too long")
    refuses("{{ 'x'.ljust(999999999) }}", "text is too long")
    refuses("{{ '\t'.expandtabs(999999999) }}", "text is too long")
    refuses("{{ ('a' * 99999).replace('', 'b' * 99999) }}", "text is too long")
    refuses("{{ (['a'] * 99999)|join('b' * 99999) }}", "text is too long")
    refuses("{{ [1]|tojson(indent=999999999) }}", "text is too long")
    refuses("{{ [1]|batch(999999999, 0)|list }}", "list is too long")
    refuses("{{ []|slice(999999999)|list }}", "list is too long")
    refuses("{{ range(100001) }}", "MAX_RANGE")
  end)

  it("growth in loops", function()
    refuses("{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
      .. "{% endfor %}", "text is too long")
    refuses("{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}"
      .. "{% endfor %}", "list is too long")
    refuses("{% set ns = namespace(l='x' * 999) %}{% for i in range(99) %}"
      .. "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}", "text is too long")
    refuses("{% set ns = namespace(l=1, k=1) %}{% for i in range(60) %}{% set ns.l = [ns.l] * 2 %}"
      .. "{% set ns.k = [ns.k] * 2 %}{% endfor %}{{ ns.l == ns.k }}", "comparison is too large")
    refuses("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "text is too long")
  end)

  it("time", function()
    for _, body in ipairs({ "{% for b in range(99999) %}{% endfor %}", "{{ l|sort|first }}",
      "{{ -1 in l }}", "{{ l|tojson|length }}", "{{ l|sum }}", "{{ s|upper|length }}",
      "{{ s.split()|length }}", "{{ s[::-1]|length }}", "{{ l == (l ~ s) }}",
      "{{ l|map('string')|join|length }}" }) do
      local source = "{% set l = range(9999)|list %}{% set s = 'é ' * 99999 %}"
        .. "{% for i in range(99999) %}" .. body .. "{% endfor %}"
      local text, message = assert(jinja.compile(source, { max_steps = 300000 })):render()
      assert.is_nil(text)
      assert.equal("template:1: template takes too long: the limit is 300000 steps", message)
    end
  end)

  it("depth of calls and of values", function()
    refuses("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested deeper than")
    refuses("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "nested deeper than")
    refuses("{% block a %}{{ self.a() }}{% endblock %}", "nested deeper than")
    local deep = "{% set ns = namespace(l=1) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}"
      .. "{% endfor %}"
    refuses(deep .. "{{ ns.l }}", "nested deeper than")
    refuses(deep .. "{{ ns.l|tojson }}", "nested deeper than")
    refuses(deep .. "{{ ns.l|pprint }}", "nested deeper than")
    refuses("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}", "nested deeper than")
  end)

  it("depth of templates", function()
    refuses("{{ " .. ("("):rep(9999), "nested deeper than")
    refuses("{{ " .. ("["):rep(9999), "nested deeper than")
    refuses("{{ " .. ("-"):rep(9999) .. "1 }}", "nested deeper than")
    refuses("{{ " .. ("not "):rep(9999) .. "1 }}", "links")
    refuses("{{ 1" .. (" + 1"):rep(9999) .. " }}", "links")
    refuses("{{ x" .. ("|e"):rep(9999) .. " }}", "links")
    refuses("{{ x" .. (".a"):rep(9999) .. " }}", "links")
    refuses("{{ 1" .. (" if 1 else 1"):rep(9999) .. " }}", "links")
    refuses(("{% if x %}"):rep(9999), "nested deeper than")
    assert.equal("2001", render("{{ 1" .. (" + 1"):rep(2000) .. " }}"))
    assert.equal("1", render("{{ 2" .. (" if 0 else 1"):rep(2000) .. " }}"))
    assert.equal("x" .. ("-"):rep(190), render("{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}-"
      .. "{% else %}x{% endif %}{% endmacro %}{{ f(190) }}"))
    assert.equal("x", render(("{% if 1 %}"):rep(90) .. "x" .. ("{% endif %}"):rep(90)))
  end)

  it("integers", function()
    for _, source in ipairs({ "9223372036854775807 + 1", "-9223372036854775807 - 2", "2 ** 63",
      "3037000500 * 3037000500", "99999999999999999999", "'99999999999999999999'|int",
      "-(-9223372036854775807 - 1)", "(-9223372036854775807 - 1) // -1", "1e300|int" }) do
      refuses("{{ " .. source .. " }}", "limited to 64 bits")
    end
    assert.equal("-9223372036854775808 9223372036854775807", render(
      "{{ -9223372036854775807 - 1 }} {{ 3037000499 * 3037000499 + 5928526806 }}"))
  end)

  it("no way out of the sandbox", function()
    assert.equal("||", render("{{ _G }}|{{ os }}|{{ string }}"))
    assert.equal("|", render("{{ ''.__class__ }}|{{ [].append }}"))
    refuses("{{ ''.__class__.__mro__ }}", "unsafe")
    refuses("{{ {}.update({}) }}", "unsafe")
    refuses("{{ '{0.__class__.x}'.format(1) }}", "unsafe")
    refuses("{% include '/etc/passwd' %}", "no loader")
  end)

  it("never takes text for a Lua pattern", function()
    assert.equal("a-b 2 ['a', 'b'] True", render(
      "{{ 'a%b'.replace('%', '-') }} {{ '%%a'.find('a') }} {{ 'a.b'.split('.') }}"
      .. " {{ '[' in 'x[' }}"))
    assert.equal("%1", render("{{ 'a'|replace('a', '%1') }}"))
  end)
end)

describe("jinja contexts", function()
  local json = require "moonlet.json"

  it("may be plain tables, whose keys are sorted", function()
    assert.equal("{'a': [1, 2.0, True], 'b': {}, 'c': None}", render("{{ x }}",
      { x = { c = json.null, b = {}, a = { 1, 2.0, true } } }))
  end)

  it("are not changed", function()
    local x = json.decode('{"b": 1, "a": 2}')
    assert.equal("{'b': 1, 'a': 2}", render("{{ x }}{% set ns = namespace(x) %}{% set ns.b = 5 %}",
      { x = x }))
    assert.equal(1, x.b)
  end)

  it("are refused with the place of what cannot be read", function()
    refuses("x", "messages[2].content is not valid UTF-8 at byte 3",
      { messages = { {}, { content = "ab\xff" } } })
    refuses("x", "f is a function", { f = print })
    refuses("x", "l is a list with holes", { l = { 1, nil, 3 } })
    refuses("x", "m mixes list items and named fields", { m = { 1, a = 2 } })
    local cycle = {}
    cycle.me = cycle
    refuses("x", "nested deeper than", { cycle = cycle })
    refuses("x", "must be a table of named values", { 1 })
  end)

  it("misuse raises", function()
    assert.has_error(function() jinja.compile(nil) end)
    assert.has_error(function() jinja.compile("x", { nme = "y" }) end)
  end)

  it("source must be UTF-8", function()
    local template, message, code = jinja.compile("ab\xff", { name = "f" })
    assert.is_nil(template)
    assert.equal("f:1: not valid UTF-8 at byte 3", message)
    assert.equal("template", code)
  end)
end)
