-- The order of types and their spellings: vLLM, tool_parsers/utils.py (coerce_to_schema_type).

local json = require "moonlet.json"
local literal = require "moonlet.literal"
local schema = require "moonlet.schema"

local function coerced(text, node, root)
  return json.encode(schema.coerce(text, assert(json.decode(node)), root))
end

describe("schema.coerce", function()
  it("leaves text alone without a type", function()
    assert.equal("12", schema.coerce("12", nil))
    assert.equal('"12"', coerced("12", "{}"))
  end)

  it("reads what each type admits", function()
    for _, case in ipairs {
      { "integer", "12", "12" }, { "integer", " -3\n", "-3" }, { "integer", "3.0", "3" },
      { "integer", "3.5", "3.5" }, { "integer", "abc", '"abc"' },
      { "integer", "0x10", '"0x10"' }, { "number", "1e3", "1000" }, { "number", "3.0", "3" },
      { "number", ".5", "0.5" }, { "number", "inf", '"inf"' }, { "number", "nan", '"nan"' },
      { "number", "1e999", '"1e999"' }, { "array", "[1e999]", '"[1e999]"' },
      { "boolean", "True", "true" }, { "boolean", "0", "false" },
      { "boolean", "yes", '"yes"' }, { "null", "None", "null" }, { "array", "[1, 2]", "[1, 2]" },
      { "array", "(1, 'a',)", '[1, "a"]' }, { "array", '"[1]"', "[1]" },
      { "array", "{}", "{}" }, { "object", "{'a': None}", '{"a": null}' },
      { "object", "{}", "{}" }, { "object", "[]", "[]" }, { "object", "{a: 1}", '"{a: 1}"' },
      { "string", "null", '"null"' }, { "string", " 1 ", '" 1 "' },
    } do
      assert.equal(case[3], coerced(case[2], ('{"type": "%s"}'):format(case[1])),
        case[1] .. " " .. case[2])
    end
  end)

  it("tries the types of a union in one order", function()
    assert.equal("null", coerced("null", '{"type": ["string", "null"]}'))
    assert.equal("7", coerced("7", '{"anyOf": [{"type": "string"}, {"type": "integer"}]}'))
    assert.equal("1", coerced("1", '{"oneOf": [{"type": "boolean"}, {"type": "integer"}]}'))
    assert.equal('"x"', coerced("x", '{"allOf": [{"type": ["string", "integer"]}]}'))
  end)

  it("takes types from enum and const", function()
    assert.equal("2", coerced("2", '{"enum": [1, 2]}'))
    assert.equal('"2"', coerced("2", '{"enum": ["1", "2"]}'))
    assert.equal("true", coerced("true", '{"const": true}'))
  end)

  it("follows references within the schema, also endless ones", function()
    local root = assert(json.decode(
      '{"$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}'))
    assert.equal("5", coerced("5", '{"$ref": "#/$defs/n"}', root))
    assert.equal('"5"', coerced("5", '{"$ref": "#/$defs/loop"}', root))
    assert.equal('"5"', coerced("5", '{"$ref": "#/$defs/none"}', root))
  end)

  it("types the members of arrays and objects", function()
    assert.equal('[{"a": 1, "b": "2", "c": "3"}]', coerced('[{"a": "1", "b": "2", "c": "3"}]',
      [[{"type": "array", "items": {"type": "object", "properties": {
        "a": {"type": "integer"}, "b": {"type": "string"}}}}]]))
  end)

  it("is not led astray by schemas that are none", function()
    for _, node in ipairs { '{"type": 3}', '{"type": null}', '{"enum": 1}', '{"anyOf": [null, 1]}',
      '{"type": ["strange"]}', '{"items": 3, "type": "array"}' } do
      assert.has_no.errors(function() coerced("[1]", node) end)
    end
  end)
end)

describe("literal.read", function()
  local function read(text)
    local ok, value = literal.read(text)
    return ok and json.encode(value) or nil
  end

  it("reads JSON and Python", function()
    assert.equal('{"a": [1, 2.5, true, null], "b": "x\'y"}',
      read([[ {'a': (1, 2.5, True, None), "b": 'x\'y',} ]]))
    assert.equal('"\\n\240\159\146\150"', read([['\n\U0001f496']]))
    assert.equal('"\240\159\146\150"', read([['\ud83d\udc96']]))
    assert.equal("null", read("None"))
    assert.equal("[]", read("()"))
  end)

  it("refuses what is neither", function()
    for _, text in ipairs { "", "a", "{", "[1", "{'a' 1}", "{1: 2}", "[1 2]", "'a", "1 2", "[,]",
      "{,}", "nan", "'\\ud800'", ("["):rep(5000) } do
      assert.is_nil(read(text), text:sub(1, 20))
    end
  end)
end)
