local json = require "moonlet.json"

local function keys_of(object)
  local keys = {}
  for key in pairs(object) do
    keys[#keys + 1] = key
  end
  return table.concat(keys, " ")
end

describe("json.decode", function()
  it("keeps integers, floats, booleans, strings and null apart", function()
    local t = assert(json.decode('[1, 1.0, -0, 1e2, true, false, null, "x", ""]'))
    assert.same({ 1, 1.0, 0, 100.0, true, false, json.null, "x", "" }, t)
    local kinds = {}
    for i = 1, 4 do
      kinds[i] = math.type(t[i])
    end
    assert.same({ "integer", "float", "integer", "float" }, kinds)
  end)

  it("keeps null apart from absence", function()
    local t = assert(json.decode('{"a": null}'))
    assert.equal(json.null, t.a)
    assert.is_nil(t.b)
    assert.equal(json.null, json.decode("null"))
  end)

  it("keeps the order of keys", function()
    local t = assert(json.decode('{"z": 1, "a": 2, "m": 3, "": 4}'))
    assert.equal("z a m ", keys_of(t))
    assert.same({ "z", "a", "m", "" }, json.keys(t))
    assert.equal(4, t[""])
  end)

  it("takes the last of equal keys at the first one's place, as Python does", function()
    local t = assert(json.decode('{"a": 1, "b": 2, "\\u0061": 3}'))
    assert.equal('{"a": 3, "b": 2}', json.encode(t))
  end)

  it("marks empty arrays and objects", function()
    local t = assert(json.decode('{"a": [], "o": {}}'))
    assert.is_true(json.is_array(t.a))
    assert.is_false(json.is_object(t.a))
    assert.is_true(json.is_object(t.o))
    assert.is_false(json.is_array(t.o))
  end)

  it("reads integers to the ends of int64 and larger ones as floats", function()
    local t = assert(json.decode([[ [9223372036854775807, -9223372036854775808,
      9223372036854775808, {"n": [-9223372036854775809]}, 123456789012345678901234567890] ]]))
    assert.equal(math.maxinteger, t[1])
    assert.equal(math.mininteger, t[2])
    assert.equal(2.0 ^ 63, t[3])
    assert.equal(-2.0 ^ 63, t[4].n[1])
    assert.equal(123456789012345678901234567890.0, t[5])
    assert.equal("float", math.type(t[3]))
  end)

  it("reads every escape", function()
    assert.equal('"\\/\b\f\n\r\t\0\u{e9}\u{20ac}\u{1f600}',
      json.decode([["\"\\\/\b\f\n\r\t\u0000\u00e9\u20AC\ud83d\ude00"]]))
  end)

  it("reads every surrogate pair, and half of one as U+FFFD", function()
    -- json-c 0.16 garbles the pairs whose low 16 bits look like a surrogate again.
    for c = 0x10000, 0x10ffff, 0x2ff do
      local s = utf8.char(c)
      assert.equal(s, json.decode(json.encode(s, { ensure_ascii = true })))
    end
    assert.equal("\u{1d800}\u{2d8ff}\u{1dfff}",
      json.decode([["\ud836\uDC00\ud876\udcFF\ud837\udfff"]]))
    local halves = {
      [ [["\ud800x"]] ] = "\u{fffd}x",
      [ [["\ud800"]] ] = "\u{fffd}",
      [ [["\udc00\ud800"]] ] = "\u{fffd}\u{fffd}",
      [ [["\ud800\u0041"]] ] = "\u{fffd}A",
      [ [["\ud800\ud800\udc00"]] ] = "\u{fffd}\u{10000}",
      [ [["\ud800\n\udfff\\"]] ] = "\u{fffd}\n\u{fffd}\\",
      [ [["\ud800\\udc00"]] ] = "\u{fffd}\\udc00",
    }
    for text, expected in pairs(halves) do
      assert.equal(expected, json.decode(text))
    end
    assert.same({ ["\u{1d800}"] = { 2.0 ^ 64, "\u{fffd}" } },
      json.decode([[{"\ud836\udc00": 1, "\ud836\udc00": [18446744073709551616, "\udbff"]}]]))
  end)

  it("refuses numbers beyond all floats where it is told to", function()
    assert.same({ math.huge, -math.huge }, json.decode("[1e999, -1e999]"))
    local value, message = json.decode('{"a": [-1e999]}', { finite = true, name = "body" })
    assert.is_nil(value)
    assert.equal("body: a number beyond what double precision holds", message)
    assert.same({ 1e308, 2.0 ^ 64 }, json.decode("[1e308, 18446744073709551616]",
      { finite = true }))
  end)

  it("refuses what RFC 8259 refuses, with the byte", function()
    local bad = {
      [""] = "byte 0: unexpected end of JSON text",
      ["  "] = "byte 2: unexpected end of JSON text",
      ["NaN"] = "byte 0: value expected",
      ["[Infinity]"] = "byte 1: value expected",
      ["{'a': 1}"] = "byte 1: key in double quotes expected",
      ["['a']"] = "byte 1: value expected",
      ["[1,]"] = "byte 3: value expected",
      ['{"a": 1,}'] = "byte 8: key in double quotes expected",
      ["[1 2]"] = "byte 3: ',' or ']' expected",
      ['{"a" 1}'] = "byte 5: ':' expected",
      ['{"a": 1 "b"}'] = "byte 8: ',' or '}' expected",
      ["[1"] = "byte 2: unexpected end of JSON text",
      ['{"a":'] = "byte 5: unexpected end of JSON text",
      ["01"] = "byte 0: number with a leading zero",
      ["1."] = "byte 2: unexpected end of JSON text",
      ["[1.]"] = "byte 3: digit expected after the point",
      ["[.5]"] = "byte 1: value expected",
      ["[1e]"] = "byte 3: digit expected in the exponent",
      ["[-]"] = "byte 2: digit expected",
      ["[+1]"] = "byte 1: value expected",
      ["tru"] = "byte 0: value expected",
      ["truex"] = "byte 4: text behind the JSON value",
      ["1 // one"] = "byte 2: text behind the JSON value",
      ['"a\nb"'] = "byte 2: raw control character in string",
      ['"abc'] = "byte 0: string is not closed",
      ['"\\x41"'] = "byte 1: invalid escape in string",
      ['"\\u12g4"'] = "byte 1: \\u without four hexadecimal digits",
      ['"\xff"'] = "byte 1: invalid UTF-8",
      ['"\xc0\x80"'] = "byte 1: invalid UTF-8",
      ['"\xed\xa0\x80"'] = "byte 1: invalid UTF-8",
      ['"\xf4\x90\x80\x80"'] = "byte 1: invalid UTF-8",
      ['"\xe2\x82"'] = "byte 1: invalid UTF-8",
      ["\xef\xbb\xbf1"] = "byte 0: value expected",
      ['{"\\u0000": 1}'] = "byte 2: U+0000 in an object key",
      ["1\0"] = "byte 1: text behind the JSON value",
    }
    for text, expected in pairs(bad) do
      local value, message, code = json.decode(text)
      assert.is_nil(value, text)
      assert.equal("JSON: " .. expected, message)
      assert.equal("format", code)
    end
  end)

  it("names the text in errors", function()
    local _, message = json.decode("x", { name = "request body" })
    assert.equal("request body: byte 0: value expected", message)
  end)

  it("limits nesting", function()
    assert.same({ { {} } }, json.decode("[[[]]]", { max_depth = 3 }))
    assert.same({ 1, { a = 2 } }, json.decode('[1,{"a":2}]', { max_values = 13 }))
    local many, why, kind = json.decode('[1,{"a":2}]', { max_values = 12, name = "body" })
    assert.same({ "body: byte 8: more than 12 values, where lists, objects and members count as 4",
      "limit" }, { why, kind, many })
    local value, message, code = json.decode("[[[[]]]]", { max_depth = 3 })
    assert.is_nil(value)
    assert.equal("JSON: byte 3: nested deeper than 3 levels", message)
    assert.equal("limit", code)
    local deep = ("["):rep(1000) .. ("]"):rep(1000)
    assert.is_nil((json.decode(deep)))
    assert.equal(deep, json.encode((assert(json.decode(deep, { max_depth = 1000 })))))
    assert.is_nil((json.decode(("["):rep(1000000), { max_depth = 1000 })))
  end)

  it("raises on misuse", function()
    assert.has_error(function() json.decode("1", { depth = 1 }) end, "unknown option 'depth'")
    assert.has_error(function() json.decode({}) end)
  end)

  it("survives every truncation and byte change of a text", function()
    local text = '{"a": [1, -2.5e+3, true, null, "\\u00e9\u{20ac}"], "b": {"c": false, "d": []}}'
    for i = 1, #text do
      assert.is_nil((json.decode(text:sub(1, i - 1))))
      for _, byte in ipairs { 0, 0x20, 0x22, 0x2c, 0x30, 0x5b, 0x5d, 0x7d, 0x80, 0xff } do
        local value, message = json.decode(text:sub(1, i - 1) .. string.char(byte)
          .. text:sub(i + 1))
        assert.is_true(value ~= nil or message:find("^JSON: byte %d+: [^\n]+$") ~= nil)
      end
    end
  end)
end)

describe("an object", function()
  local t
  before_each(function()
    t = assert(json.decode('{"a": 1, "b": 2}'))
  end)

  it("puts new keys last", function()
    t.z = 3
    t.c = 4
    t.a = 5
    assert.equal('{"a": 5, "b": 2, "z": 3, "c": 4}', json.encode(t))
  end)

  it("forgets removed keys and puts them last when they come again", function()
    t.a = nil
    assert.equal('{"b": 2}', json.encode(t))
    t.a = 7
    t.c = 8
    assert.equal("b a c", keys_of(t))
    t.none = nil
    assert.same({ "b", "a", "c" }, json.keys(t))
  end)

  it("can hold false", function()
    t.f = false
    assert.equal('{"a": 1, "b": 2, "f": false}', json.encode(t))
  end)

  it("shows next only its members", function()
    local n = 0
    for _ in next, t do
      n = n + 1
    end
    assert.equal(2, n)
    assert.is_nil(next((json.decode("{}"))))
  end)

  it("can be made from a table, with an order", function()
    local o = json.object({ x = 1, y = 2, z = 3 }, { "z", "none" })
    assert.equal('{"z": 3, "x": 1, "y": 2}', json.encode(o))
    o.a = 4
    assert.equal("z x y a", keys_of(o))
    assert.equal(o, json.object(o))
    assert.equal("z x y a", keys_of(o))
    assert.equal("{}", json.encode(json.object()))
  end)

  it("is not an array", function()
    assert.has_error(function() json.array(t) end, "the table is a JSON object")
  end)
end)

describe("json.quote", function()
  it("spells a string as json.encode does", function()
    for _, text in ipairs { "", "a\"\\\n\0\127é", "\xe9", "\u{1F600}" } do
      assert.equal(json.encode(text), json.quote(text))
    end
  end)
end)

describe("json.encode", function()
  it("cuts no character of a long string", function()
    for n = 65530, 65540 do
      local before = ("a"):rep(n)
      for _, tail in ipairs { "é", "€", "😀", "\xF0\x9F\x98", "\x80\x80\x80\x80\x80", '"' } do
        local want = json.encode(tail):sub(2)
        assert.equal('"' .. before .. want, json.encode(before .. tail))
      end
    end
  end)

  -- Expected texts are the output of Python 3.11: json.dumps(value, ensure_ascii=False, ...).
  it("spells numbers as Python does", function()
    local spelled = {
      { 1, "1" }, { -7, "-7" }, { math.mininteger, "-9223372036854775808" },
      { 1.0, "1.0" }, { -0.0, "-0.0" }, { 0.1, "0.1" }, { 1e15, "1000000000000000.0" },
      { 1e16, "1e+16" }, { 123456789012345680.0, "1.2345678901234568e+17" },
      { 1e22, "1e+22" }, { 1e-4, "0.0001" }, { 1e-5, "1e-05" }, { 1.5e-7, "1.5e-07" },
      { 1e100, "1e+100" }, { 5e-324, "5e-324" }, { 2.2250738585072014e-308,
        "2.2250738585072014e-308" }, { 1.7976931348623157e308, "1.7976931348623157e+308" },
      { 2.0 ^ -44, "5.684341886080802e-14" }, { 0.1 + 0.2, "0.30000000000000004" },
      { 100.0, "100.0" }, { 0.7, "0.7" }, { 3.14159, "3.14159" }, { 9007199254740993.0,
        "9007199254740992.0" }, { 2.0 ^ 63, "9.223372036854776e+18" },
    }
    for _, case in ipairs(spelled) do
      assert.equal(case[2], json.encode(case[1]))
    end
  end)

  it("gives floats that read back as the same number", function()
    local state = 42
    for _ = 1, 5000 do
      state = state * 6364136223846793005 + 1442695040888963407
      local x = string.unpack("<d", string.pack("<i8", state))
      if x == x and x - x == 0 then
        assert.equal(x, json.decode(json.encode(x)))
      end
    end
  end)

  it("escapes strings as Python does", function()
    local s = 'a"b\\c/\b\f\n\r\t\0\x1f\x7f\u{e9}\u{2028}\u{1f600}'
    assert.equal([["a\"b\\c/\b\f\n\r\t\u0000\u001f]] .. "\x7f\u{e9}\u{2028}\u{1f600}\"",
      json.encode(s))
    assert.equal([["a\"b\\c/\b\f\n\r\t\u0000\u001f\u007f\u00e9\u2028\ud83d\ude00"]],
      json.encode(s, { ensure_ascii = true }))
  end)

  it("replaces what is not UTF-8, piece by piece", function()
    assert.equal('"a\u{fffd}b"', json.encode("a\xffb"))
    assert.equal('"\u{fffd}"', json.encode("\xe2\x82"))
    assert.equal('"\u{fffd}\u{fffd}\u{fffd}"', json.encode("\xed\xa0\x80"))
    assert.equal([["\ufffd"]], json.encode("\xf0\x9f\x98", { ensure_ascii = true }))
  end)

  it("separates and indents as Python does", function()
    local t = json.decode('{"b": [1, [], {}], "a": {"k": [true, null]}}')
    assert.equal('{"b": [1, [], {}], "a": {"k": [true, null]}}', json.encode(t))
    assert.equal('{"b":[1,[],{}],"a":{"k":[true,null]}}',
      json.encode(t, { separators = { ",", ":" } }))
    assert.equal([[
{
  "b": [
    1,
    [],
    {}
  ],
  "a": {
    "k": [
      true,
      null
    ]
  }
}]], json.encode(t, { indent = 2 }))
    assert.equal("[\n1\n]", json.encode({ 1 }, { indent = 0 }))
    assert.equal("[\n\t1\n]", json.encode({ 1 }, { indent = "\t" }))
    assert.equal('{"a": {"k": [true, null]}, "b": [1, [], {}]}',
      json.encode(t, { sort_keys = true }))
  end)

  it("takes tables without a mark as they look", function()
    assert.equal('[1, {"a": 1, "b": {}}, "x"]', json.encode({ 1, { b = {}, a = 1 }, "x" }))
    assert.equal("[]", json.encode(json.array()))
    assert.equal("[null]", json.encode({ json.null }))
    assert.equal("null", json.encode(nil))
  end)

  it("raises on what JSON cannot hold", function()
    local function cannot(value, message)
      local ok, raised = pcall(json.encode, value)
      assert.is_false(ok)
      assert.truthy(raised:find(message, 1, true), raised)
    end
    cannot(print, "cannot encode a function")
    cannot({ 1, nil, 3, x = 1 }, "cannot encode an array with key 'x'")
    cannot({ a = 1, [2.5] = 1 }, "cannot encode an object with key '2.5'")
    cannot({ [0] = 1 }, "cannot encode an object with key '0'")
    cannot({ 0 / 0 }, "cannot encode NaN")
    cannot({ a = -math.huge }, "cannot encode -Infinity")
    local loop = {}
    loop[1] = loop
    cannot(loop, "cannot encode more than 1000 levels (a cycle?)")
    assert.has_error(function() json.encode(1, { indend = 2 }) end, "unknown option 'indend'")
  end)

  it("spells what is no number when asked", function()
    assert.equal("[NaN, Infinity, -Infinity]",
      json.encode({ 0 / 0, math.huge, -math.huge }, { allow_nan = true }))
  end)
end)

describe("json.read", function()
  it("names the file", function()
    local path = os.tmpname()
    local file = assert(io.open(path, "w"))
    file:write('{"a": 1}')
    file:close()
    assert.same({ a = 1 }, json.read(path))
    file = assert(io.open(path, "w"))
    file:write("{")
    file:close()
    local value, message, code = json.read(path)
    os.remove(path)
    assert.is_nil(value)
    assert.equal(path .. ": byte 1: unexpected end of JSON text", message)
    assert.equal("format", code)
    assert.equal("io", select(3, json.read(path)))
    assert.equal("io", select(3, json.read("/")))
  end)
end)
