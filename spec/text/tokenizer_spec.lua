-- moonlet.tokenizer: options, streams, misuse, and input meant to be slow.
local tokenizer = require "moonlet.tokenizer"
local tiny = require "spec.text.tiny"
local vectors = require "spec.text.vectors"

local function open(changes)
  local dir = tiny.dir { ["tokenizer.json"] = tiny.json(changes) }
  local tok = assert(tokenizer.open(dir))
  tiny.remove(dir)
  return tok
end

local function encode(tok, text, opts)
  return table.concat(tok:encode(text, opts), " ")
end

describe("encoding", function()
  local tok <const> = open()

  it("recognises control strings unless told not to", function()
    assert.equal("97 259 260 98", encode(tok, "a<s><t>b"))
    assert.equal("97 259 260 98", encode(tok, "a<s><t>b", { special = true }))
    assert.equal("97 60 115 62 98", encode(tok, "a<s>b", { special = false }))
    assert.equal("", encode(tok, ""))
  end)

  it("packs ids and plain ranges", function()
    local list = tokenizer.new_ids()
    assert.equal(0, #list)
    assert.same({}, list:slice())
    list:append { 5, -1, 1 << 30 }
    list:append(7)
    list:append(list)
    assert.same({ 5, -1, 1 << 30, 7, 5, -1, 1 << 30, 7 }, list:slice())
    assert.same({ -1, 1 << 30 }, list:slice(2, 3))
    assert.same({ 7 }, list:slice(8, 100))
    assert.same({}, list:slice(9))
    assert.error(function() list:append { "x" } end)
    assert.error(function() list:append(1 << 40) end)
    for i = 1, 1000 do list:append(i) end
    assert.same({ 999, 1000 }, list:slice(#list - 1))
    list:close()
    assert.equal(0, #list)
    list:append { 3, 5, 9, 9 }
    local text = "ab<|im_end|>cd<|im_end|>"
    local demo <close> = assert(tokenizer.open("examples/demo-model"))
    local ids = demo:encode(text, { packed = true, plain = list })
    assert.same(demo:encode(text, { plain = { { 3, 5 }, { 9, 9 } } }), ids:slice())
    assert.same(demo:encode(text), demo:encode(text, { packed = true }):slice())
    list:append(10)
    assert.error(function() demo:encode(text, { plain = list }) end)
  end)

  it("recognises none that touches a plain range", function()
    local text = "<s>a<s>b<s>" -- tokens at 1-3, 5-7, 9-11
    local s = "60 115 62"
    local function plain(...) return encode(tok, text, { plain = { ... } }) end
    assert.equal("259 97 259 98 259", plain())
    assert.equal(("%s 97 %s 98 %s"):format(s, s, s), plain { 1, 11 })
    assert.equal(("259 97 %s 98 259"):format(s), plain { 5, 7 })
    assert.equal(("259 97 %s 98 259"):format(s), plain { 7, 7 })
    assert.equal(("259 97 %s 98 259"):format(s), plain { 4, 5 })
    assert.equal(("%s 97 259 98 %s"):format(s, s), plain({ 3, 4 }, { 8, 9 }))
    assert.equal("259 97 259 98 259", plain({ 4, 4 }, { 8, 8 }))
    assert.equal("259 97 259 98 259", plain({ 6, 5 }, { 12, 11 })) -- empty ranges
  end)

  it("changes nothing else at a plain range's ends", function()
    assert.equal("257", encode(tok, "abc", { plain = { { 2, 2 } } }))
    assert.equal("195 169", encode(tok, "e\u{301}", { plain = { { 2, 3 } } }))
    assert.equal("101", encode(tok, "e", { plain = { { 1, 1 } } }))
  end)

  it("takes plain ranges through NFC", function()
    local late <close> = open { added = { '{"id":259,"content":"<s>","normalized":true}' } }
    local function plain(text, ...) return encode(late, text, { plain = { ... } }) end
    local s = "60 115 62"
    assert.equal("195 169 259 97", plain("e\u{301}<s>a"))
    assert.equal("195 169 259 97", plain("e\u{301}<s>a", { 2, 3 }, { 7, 7 }))
    assert.equal("195 169 " .. s .. " 97", plain("e\u{301}<s>a", { 4, 4 }))
    assert.equal("195 169 " .. s .. " 97", plain("e\u{301}<s>a", { 6, 6 }))
    -- a mark behind the token: one that is composed with it unmakes it, another does not
    assert.equal("60 115 226 137 175", plain("<s>\u{338}", { 4, 5 }))
    assert.equal("259 204 129", plain("<s>\u{301}", { 4, 5 }))
    assert.equal(s .. " 204 129", plain("<s>\u{301}", { 3, 3 }))
    -- bytes that are no text become three each; two runs in one stretch of marks
    assert.equal("239 191 189 259 239 191 189", plain("\xff<s>\xff", { 1, 1 }, { 5, 5 }))
    assert.equal("259 204 129 204 129 259", plain("<s>\u{301}\u{301}<s>", { 4, 5 }, { 6, 7 }))
    assert.equal("259 " .. s .. " 259", plain("<s><s><s>", { 5, 5 }))
  end)

  it("takes the leftmost token, then the longest", function()
    local names = { "<s", "<s>", "<s>x", "s>", "x<" }
    local added = {}
    for i, name in ipairs(names) do
      added[i] = ('{"id":%d,"content":"%s"}'):format(258 + i, name)
    end
    local many <close> = open { added = added }
    assert.equal("259", encode(many, "<s"))
    assert.equal("260", encode(many, "<s>"))
    assert.equal("261 60", encode(many, "<s>x<"))
    assert.equal("260 121", encode(many, "<s>y"))
    assert.equal("262 263 115", encode(many, "s>x<s"))
    -- a range that cuts the longest leaves the shorter one
    assert.equal("260 120", encode(many, "<s>x", { plain = { { 4, 4 } } }))
  end)

  it("repairs what is not UTF-8, beside tokens too", function()
    local fffd = "239 191 189"
    assert.equal(fffd .. " 259 " .. fffd, encode(tok, "\xe2\x82<s>\x82"))
    assert.equal(fffd .. " 60 115 " .. fffd .. " 62", encode(tok, "\xff<s\xff>"))
  end)

  it("agrees on tokens that tokenizer_config.json declares", function()
    local golden = "spec/golden/text/config-tokens.tokenizer_config.json"
    local dir = tiny.dir {
      ["tokenizer.json"] = tiny.read("examples/demo-model/tokenizer.json"),
      ["tokenizer_config.json"] = tiny.read(golden),
    }
    local with <close> = assert(tokenizer.open(dir))
    tiny.remove(dir)
    local rows = vectors.rows("config-tokens-demo")
    assert.equal(17, #rows)
    for _, row in ipairs(rows) do
      assert.same(table.concat(row.ids, " "), encode(with, row.text), row.name)
      assert.equal(row.decoded, with:decode(row.ids))
      assert.equal(row.decoded_skip_special, with:decode(row.ids, { skip_special = true }))
    end
  end)
end)

describe("splitting", function()
  it("hands out what lies between matches, and steps over empty ones", function()
    local digits <close> = open { pattern = [[\d+]] }
    assert.same({ "a", "12", "b", "3" }, digits:split("a12b3"))
    local empty <close> = open { pattern = "x*" }
    assert.same({ "a", "é", "xx", "b" }, empty:split("aéxxb"))
    assert.same({}, empty:split(""))
  end)

  it("normalises as tokenizers does, by Unicode 9", function()
    local demo <close> = assert(tokenizer.open("examples/demo-model"))
    for _, case in ipairs {
      { "a\u{345}\u{334}", "a\u{334}\u{345}" },
      { "a\u{345}\u{334}\u{1dfa}\u{334}", "a\u{334}\u{345}\u{1dfa}\u{334}" }, -- mark of 14
      { "e\u{1abf}\u{301}", "e\u{1abf}\u{301}" }, -- mark of 13
      { "\u{11935}\u{11930}", "\u{11935}\u{11930}" }, -- composes since 13
      { "\u{11938}", "\u{11938}" },
      { "\u{ac00}\u{11a7}", "\u{ac00}\u{11a7}" }, -- no trailing consonant in any version
      { "\u{ac00}\u{11a8}", "\u{ac01}" },
    } do
      assert.equal(case[2], table.concat(demo:split(case[1])))
    end
  end)

  it([[reads \s as White_Space, in classes too]], function()
    local outside <close> = open { pattern = [[\s|\S+]] }
    local inside <close> = open { pattern = [=[[\s]|[^\s]+]=] }
    local negated <close> = open { pattern = [=[[^\S]|[\S]+]=] }
    local spaces = { 0x9, 0xa, 0xb, 0xc, 0xd, 0x20, 0x85, 0xa0, 0x1680, 0x2000, 0x200a, 0x2028,
      0x2029, 0x202f, 0x205f, 0x3000 }
    local others = { 0x8, 0xe, 0x1c, 0x1f, 0x21, 0x84, 0x86, 0x9f, 0xa1, 0x167f, 0x1681, 0x180e,
      0x1fff, 0x200b, 0x2027, 0x202a, 0x202e, 0x2030, 0x205e, 0x2060, 0x2fff, 0x3001, 0xfeff,
      0x10ffff }
    for _, tok in ipairs { outside, inside, negated } do
      for _, c in ipairs(spaces) do
        assert.equal(3, #tok:split("a" .. utf8.char(c) .. "b"), ("U+%04X"):format(c))
      end
      for _, c in ipairs(others) do
        assert.equal(1, #tok:split("a" .. utf8.char(c) .. "b"), ("U+%04X"):format(c))
      end
    end
  end)

  it("stops a pattern that backtracks without end", function()
    local tok <close> = open { pattern = "(?:a|a)+b|(?:a+)+c" }
    local ids, message, code = tok:encode(("a"):rep(4000))
    assert.is_nil(ids)
    assert.equal("limit", code)
    assert.truthy(message:find("split pattern gives up at byte 0", 1, true), message)
  end)
end)

describe("decoding", function()
  local tok <const> = open()

  it("knows ids and bytes", function()
    assert.equal(261, tok:n_vocab())
    assert.equal(259, tok:id("<s>"))
    assert.equal(257, tok:id("abc"))
    assert.equal(258, tok:id("Ġa"))
    assert.is_nil(tok:id(" a"))
    assert.is_nil(tok:id("<u>"))
    assert.equal(" a", tok:token_bytes(258))
    assert.equal("\0", tok:token_bytes(0))
    assert.equal("<s>", tok:token_bytes(259))
    for _, id in ipairs { -1, 261, 1 << 31, 1 << 40, math.mininteger } do
      assert.is_nil(tok:token_bytes(id))
      assert.is_false(tok:is_special(id))
    end
    assert.is_true(tok:is_special(259))
    assert.is_false(tok:is_special(260))
    assert.is_false(tok:is_special(97))
  end)

  it("drops special tokens on request", function()
    assert.equal("a<s><t>b", tok:decode { 97, 259, 260, 98 })
    assert.equal("a<t>b", tok:decode({ 97, 259, 260, 98 }, { skip_special = true }))
    assert.equal("", tok:decode {})
  end)

  it("names an id without token", function()
    local text, message, code = tok:decode { 97, 261 }
    assert.is_nil(text)
    assert.equal("range", code)
    assert.equal("entry 1: token id 261 is not in the vocabulary", message)
  end)

  it("streams whole characters, and goes on after a wrong id", function()
    local stream <close> = tok:stream()
    assert.equal("", stream:step(0xe2))
    assert.is_nil((stream:step(-1)))
    assert.equal("", stream:step(0x82))
    assert.equal("€", stream:step(0xac))
    assert.equal("", stream:step(0xf0))
    assert.equal("\u{fffd}a", stream:step(97))
    assert.equal("", stream:step(0xf0))
    assert.equal("\u{fffd}", stream:finish())
    assert.equal("", stream:finish())
    assert.equal("a", stream:step(97)) -- a stream may be used again
  end)

  it("streams the same text as decoding at once", function()
    math.randomseed(20261121)
    for _ = 1, 300 do
      local ids = {}
      for i = 1, math.random(0, 20) do ids[i] = math.random(0, 260) end
      for _, skip in ipairs { false, true } do
        local stream <close> = tok:stream { skip_special = skip }
        local text = {}
        for i, id in ipairs(ids) do text[i] = stream:step(id) end
        text[#text + 1] = stream:finish()
        for _, piece in ipairs(text) do assert.truthy(utf8.len(piece)) end
        assert.equal(tok:decode(ids, { skip_special = skip }), table.concat(text))
      end
    end
  end)
end)

describe("misuse raises:", function()
  local tok <const> = open()
  local closed = open()
  local stream_closed, orphan = tok:stream(), closed:stream()
  closed:close()
  closed:close() -- as often as one likes
  stream_closed:close()

  for what, case in pairs {
    ["no path"] = { "string expected", function() tokenizer.open() end },
    ["no text"] = { "string expected", function() tok:encode() end },
    ["unknown option"] = { "unknown option 'x'", function() tok:encode("a", { x = 1 }) end },
    ["wrong option"] = { "option 'special'", function() tok:encode("a", { special = 1 }) end },
    ["plain is no table"] = { "option 'plain'", function() tok:encode("a", { plain = 1 }) end },
    ["plain of numbers"] = { "entry 1", function() tok:encode("a", { plain = { 1, 1 } }) end },
    ["plain of text"] = { "entry 1", function()
      tok:encode("a", { plain = { { "x", 1 } } })
    end },
    ["plain backwards"] = { "entry 1: 3..1 is no range", function()
      tok:encode("abc", { plain = { { 3, 1 } } })
    end },
    ["plain before the text"] = { "entry 1: 0..1 is no range", function()
      tok:encode("abc", { plain = { { 0, 1 } } })
    end },
    ["plain behind the text"] = { "option 'plain'", function()
      tok:encode("abc", { plain = { { 2, 4 } } })
    end },
    ["plain out of order"] = { "option 'plain'", function()
      tok:encode("abc", { plain = { { 2, 2 }, { 1, 1 } } })
    end },
    ["ids of text"] = { "not a token id", function() tok:decode { "x" } end },
    ["ids too large"] = { "not a token id", function() tok:decode { 1 << 31 } end },
    ["no ids"] = { "table expected", function() tok:decode(1) end },
    ["decode option"] = { "unknown option", function() tok:decode({}, { special = true }) end },
    ["stream option"] = { "unknown option", function() tok:stream { special = true } end },
    ["step without id"] = { "number expected", function() tok:stream():step() end },
    ["closed tokenizer"] = { "tokenizer is closed", function() closed:encode("a") end },
    ["closed stream"] = { "stream is closed", function() stream_closed:step(1) end },
    ["stream of a closed tokenizer"] = { "tokenizer is closed", function() orphan:step(1) end },
    ["another object"] = { "expected", function() tok.encode(io.stdout, "a") end },
  } do
    it(what, function()
      local ok, message = pcall(case[2])
      assert.is_false(ok)
      assert.truthy(tostring(message):find(case[1], 1, true), message)
    end)
  end
end)

describe("input meant to be slow", function()
  local tok <const> = assert(tokenizer.open("examples/demo-model"))
  local N = 200000

  -- Quadratic work on any of these takes minutes; the bound only has to tell the two apart.
  for what, text in pairs {
    spaces = (" "):rep(N), ["spaces and a letter"] = (" "):rep(N) .. "x",
    newlines = ("\n"):rep(N), ["lines of one space"] = (" \n"):rep(N // 2),
    ["one letter"] = ("a"):rep(N), ["two letters"] = ("ab"):rep(N // 2),
    punctuation = ("-"):rep(N), ["almost tokens"] = ("<|im_start|"):rep(N // 11),
    ["marks in bad order"] = "e" .. ("\u{301}\u{316}"):rep(N // 4),
    ["broken bytes"] = ("\x80"):rep(N), ["cut sequences"] = ("\xf0\x9f\x98"):rep(N // 3),
    jamo = ("\u{1100}\u{1161}\u{11a8}"):rep(N // 9), zeros = ("\0"):rep(N),
  } do
    it(what, function()
      local begin = os.clock()
      local ids = assert(tok:encode(text))
      assert.truthy(os.clock() - begin < 5)
      if utf8.len(text) and what ~= "marks in bad order" and what ~= "jamo" then
        assert.equal(text, tok:decode(ids))
      end
    end)
  end
end)
