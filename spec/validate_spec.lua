-- From the meaning of the keywords in JSON Schema 2020-12.

local json = require "moonlet.json"
local validate = require "moonlet.validate"

local function check(schema, value)
  local ok, message = validate.check(json.decode(value), json.decode(schema), "x")
  return ok and "ok" or message
end

describe("validate", function()
  it("knows types, and integers that are spelled as floats", function()
    local cases = {
      { "string", '"a"', "1" }, { "integer", "1", "1.5" }, { "integer", "2.0", '"2"' },
      { "number", "1", '"1"' }, { "number", "1.5", "true" }, { "boolean", "false", "0" },
      { "null", "null", "false" }, { "array", "[]", "{}" }, { "object", "{}", "[]" },
    }
    for _, case in ipairs(cases) do
      local schema = ('{"type": "%s"}'):format(case[1])
      assert.equal("ok", check(schema, case[2]))
      assert.equal(("x: %s expected, got %s"):format(case[1], case[3]), check(schema, case[3]))
    end
    assert.equal("ok", check('{"type": ["string", "null"]}', "null"))
    assert.equal("x: string or null expected, got 1", check('{"type": ["string", "null"]}', "1"))
  end)

  it("names the place", function()
    local schema = [[{"type": "object", "required": ["edits"], "properties": {
      "edits": {"type": "array", "items": {"type": "object", "required": ["old"],
        "properties": {"old": {"type": "string"}}}}}}]]
    assert.equal("ok", check(schema, '{"edits": [{"old": "a"}], "more": 1}'))
    assert.equal("x.edits: is missing", check(schema, "{}"))
    assert.equal("x.edits[1].old: is missing", check(schema, '{"edits": [{"old": "a"}, {}]}'))
    assert.equal("x.edits[0].old: string expected, got 3", check(schema, '{"edits": [{"old": 3}]}'))
  end)

  it("knows values, bounds and lengths", function()
    assert.equal("ok", check('{"enum": ["a", 1, null, {"b": [1]}]}', '{"b": [1]}'))
    assert.equal('x: one of "a", 1 expected, got 2', check('{"enum": ["a", 1]}', "2"))
    assert.equal("x: one of 3 expected, got 4", check('{"const": 3}', "4"))
    local bounds = {
      { '{"minimum": 2}', "2", "1", "at least 2" }, { '{"maximum": 2}', "2", "3", "at most 2" },
      { '{"exclusiveMinimum": 2}', "2.5", "2", "more than 2" },
      { '{"exclusiveMaximum": 2}', "1", "2", "less than 2" },
    }
    for _, case in ipairs(bounds) do
      assert.equal("ok", check(case[1], case[2]))
      assert.equal(("x: %s expected"):format(case[4]), check(case[1], case[3]))
      assert.equal("ok", check(case[1], '"no number"'))
    end
    assert.equal("ok", check('{"maxLength": 2}', '"\u{20AC}\u{20AC}"'))
    assert.matches("at most 2 characters", check('{"maxLength": 2}', '"abc"'))
    assert.matches("at least 2 characters", check('{"minLength": 2}', '"a"'))
    assert.matches("at least 1 items", check('{"minItems": 1}', "[]"))
    assert.matches("at most 1 items", check('{"maxItems": 1}', "[1, 2]"))
  end)

  it("knows other members", function()
    local closed = '{"properties": {"a": {}}, "additionalProperties": false}'
    assert.equal("ok", check(closed, '{"a": 1}'))
    assert.equal("x.b: is not expected", check(closed, '{"a": 1, "b": 2}'))
    assert.equal("x.b: string expected, got 2",
      check('{"additionalProperties": {"type": "string"}}', '{"b": 2}'))
  end)

  it("knows combinations and references", function()
    local any = '{"anyOf": [{"type": "string"}, {"type": "null"}]}'
    assert.equal("ok", check(any, "null"))
    assert.equal("x: string expected, got 1", check(any, "1"))
    local one = '{"oneOf": [{"type": "integer"}, {"minimum": 5}]}'
    assert.equal("ok", check(one, "1"))
    assert.matches("fits several", check(one, "7"))
    assert.matches("integer expected", check(one, "1.5"))
    assert.equal("x: integer expected, got 1.5",
      check('{"allOf": [{"type": "number"}, {"type": "integer"}]}', "1.5"))
    assert.equal("ok", check('{"not": {"type": "string"}}', "1"))
    assert.matches("ruled out", check('{"not": {"type": "string"}}', '"a"'))
    local tree = [[{"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties":
      {"next": {"$ref": "#/$defs/node"}}}}}]]
    assert.equal("ok", check(tree, '{"next": {"next": {}}}'))
    assert.equal("x.next.next: object expected, got 1", check(tree, '{"next": {"next": 1}}'))
  end)

  it("asks for nothing where a schema is damaged or says nothing", function()
    for _, schema in ipairs { "{}", "true", '{"enum": 3}', '{"required": "a"}',
      '{"properties": 3}', '{"minimum": "a"}', '{"items": 3}', '{"anyOf": {}}',
      '{"$ref": "#/none"}', '{"pattern": "("}' } do
      assert.equal("ok", check(schema, '{"a": [1]}'), schema)
    end
    assert.equal("x: nothing is allowed here", check("false", "1"))
  end)

  it("comes to an end where schemas refer to themselves", function()
    assert.equal("ok", check('{"$ref": "#"}', "1"))
    assert.equal("ok", check('{"anyOf": [{"$ref": "#"}]}', "1"))
  end)
end)
