-- What is read, and what is refused: every refusal is one line that names file and field.
local tokenizer = require "moonlet.tokenizer"
local json = require "moonlet.json"
local tiny = require "spec.text.tiny"

local DIR = tiny.dir {}

local function open(files)
  for _, name in ipairs { "tokenizer.json", "tokenizer_config.json" } do
    os.remove(DIR .. "/" .. name)
  end
  tiny.write(DIR, files)
  local tok, message, code = tokenizer.open(DIR)
  return tok, message and message:gsub("^" .. DIR, "DIR"), code
end

teardown(function() tiny.remove(DIR) end)

local function encode(changes, text)
  local tok <close> = assert(open { ["tokenizer.json"] = tiny.json(changes) })
  return table.concat(tok:encode(text), " ")
end

local function refusal(changes)
  local tok, message, code = open { ["tokenizer.json"] = tiny.json(changes) }
  assert.is_nil(tok)
  assert.is_nil(message:find("%c"), message)
  return message, code
end

describe("a tokenizer.json", function()
  it("is read from a directory or by name", function()
    local dir = tiny.dir { ["tokenizer.json"] = tiny.json(), ["other.json"] = tiny.json() }
    for _, path in ipairs { dir, dir .. "/", dir .. "/tokenizer.json", dir .. "/other.json" } do
      local tok <close> = assert(tokenizer.open(path))
      assert.equal(261, tok:n_vocab())
    end
    tiny.remove(dir)
  end)

  it("merges by rank, leftmost first", function()
    assert.equal("257 256 257 97", encode({}, "abcababca"))
    assert.equal("97 258", encode({ merges = { { "b", "c" }, { "a", "b" } },
      entries = { "ab", "x", "bc" } }, "abc"))
  end)

  it("may spell merges as one string", function()
    assert.equal("257", encode({ merge_list = '["a b","ab c"]' }, "abc"))
  end)

  it("is the same however its JSON is spaced and spelled", function()
    local spelled = {
      vocab = '{ "[":91 ,\n\t"\\u007b" : 123, "\\"":34 , "\\\\":92,"]":93,"[{":256, "\\"]" :257 }',
      merge_list = ' [ [ "[","{" ] ,\n"\\" ]" ] ',
    }
    assert.equal("256 257 92", encode(spelled, '[{"]\\'))
    assert.equal("97", encode({ vocab = '{"a":97}', merge_list = " [ ] " }, "a"))
    assert.equal("", encode({ vocab = "{ }", merge_list = "[]" }, "a"))
  end)

  it("gives an entry that comes twice its last id", function()
    local tok <close> = assert(open { ["tokenizer.json"] = tiny.json {
      vocab = '{"a":1,"b":5,"a":3,"b":5}', merge_list = "[]" } })
    assert.same({ 3, 5 }, tok:encode("ab"))
    assert.equal("a", tok:decode { 3 })
    assert.is_nil((tok:decode { 1 }))
  end)

  it("may go without normalizer, split or both", function()
    assert.equal("101 204 129", encode({ normalizer = "null" }, "e\u{301}"))
    assert.equal("195 169", encode({}, "e\u{301}"))
    local whole = '{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}'
    assert.equal("258", encode({ pre_tokenizer = whole }, " a"))
    assert.equal("32 97", encode({}, " a"))
  end)

  it("may use GPT-2's split", function()
    local tok <close> = assert(open { ["tokenizer.json"] = tiny.json {
      pre_tokenizer = '{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true}' } })
    assert.same({ "I", "'ll", " go", "  ", " 123", "!?", "\n" }, tok:split("I'll go   123!?\n"))
  end)

  it("takes truncation and padding for what they are: settings of training", function()
    local text = tiny.json():gsub('"truncation":null,"padding":null',
      '"truncation":{"max_length":1},"padding":{"strategy":"BatchLongest"}')
    local tok <close> = assert(open { ["tokenizer.json"] = text })
    assert.same({ 257, 97 }, tok:encode("abca"))
  end)

  it("may declare a vocabulary entry as a token", function()
    local changes = { entries = { "ab", "abc", " a", "<u>" },
      added = { '{"id":259,"content":"<u>","special":true}' } }
    assert.equal("97 259 98", encode(changes, "a<u>b"))
  end)
end)

describe("refused by name:", function()
  local cases = {
    { "WordPiece", { model = '"type":"WordPiece"' }, "model: type WordPiece is not supported" },
    { "no type", { model = '"dropout":null' }, "model: type null is not supported" },
    { "dropout", { model = '"type":"BPE","dropout":0.1' },
      "model.dropout: a number is not supported" },
    { "byte_fallback", { model = '"type":"BPE","byte_fallback":true' },
      "model.byte_fallback: true is not supported" },
    { "unk_token", { model = '"type":"BPE","unk_token":"<unk>"' },
      "model.unk_token: <unk> is not supported" },
    { "ignore_merges", { model = '"type":"BPE","ignore_merges":true' },
      "model.ignore_merges: true is not supported" },
    { "unknown field", { model = '"type":"BPE","new":1' }, "model.new is not supported" },
    { "unknown part", { more = ',"extra":{}' }, "tokenizer.extra is not supported" },
    { "NFKC", { normalizer = '{"type":"NFKC"}' }, "normalizer: type NFKC is not supported" },
    { "Metaspace", { pre_tokenizer = '{"type":"Metaspace"}' },
      "pre_tokenizer: type Metaspace is not supported" },
    { "no pre-tokenizer", { pre_tokenizer = "null" },
      "pre_tokenizer: type null is not supported" },
    { "empty Sequence", { pre_tokenizer = '{"type":"Sequence","pretokenizers":[]}' },
      "pre_tokenizer: a Sequence of 0 is not supported, only ByteLevel and Split, ByteLevel" },
    { "two splits", { byte_level = '{"type":"ByteLevel","use_regex":true}' },
      "pre_tokenizer: ByteLevel with use_regex behind a Split is not supported" },
    { "prefix space", { byte_level = '{"type":"ByteLevel","add_prefix_space":true}' },
      "pre_tokenizer.ByteLevel.add_prefix_space: true is not supported" },
    { "Removed", { split = '{"type":"Split","pattern":{"Regex":%s},"behavior":"Removed"}' },
      "pre_tokenizer.Split: behavior Removed is not supported" },
    { "invert", { split = '{"type":"Split","pattern":{"Regex":%s},"invert":true}' },
      "pre_tokenizer.Split.invert: true is not supported" },
    { "String", { split = '{"type":"Split","pattern":{"String":%s},"behavior":"Isolated"}' },
      "pre_tokenizer.Split: pattern has no Regex" },
    { "Sequence decoder", { decoder = '{"type":"Sequence"}' },
      "decoder: type Sequence is not supported" },
    { "no decoder", { decoder = "null" }, "decoder: type null is not supported" },
    { "template with a prefix", { post_processor = '{"type":"TemplateProcessing","single":['
      .. '{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}]}' },
      "post_processor: type TemplateProcessing is not supported" },
    { "single_word", { added = { '{"id":259,"content":"<s>","single_word":true}' } },
      "token '<s>': added_tokens.single_word: true is not supported" },
    { "lstrip", { added = { '{"id":259,"content":"<s>","lstrip":true}' } },
      "token '<s>': added_tokens.lstrip: true is not supported" },
    { "rstrip", { added = { '{"id":259,"content":"<s>","rstrip":true}' } },
      "token '<s>': added_tokens.rstrip: true is not supported" },
    { "normalized", { added = { '{"id":259,"content":"é","normalized":true}' } },
      "token 'é': added_tokens: normalized is not supported beyond ASCII" },
  }
  for _, case in ipairs(cases) do
    it(case[1], function()
      local message, code = refusal(case[2])
      assert.equal("DIR/tokenizer.json: " .. case[3], message)
      assert.equal("unsupported", code)
    end)
  end

  for pattern, what in pairs {
    [ [[\w+]] ] = [['\w']], [ [[a\b]] ] = [['\b']], [ [[\x41]] ] = [['\x']],
    ["^a"] = "'^'", ["a$"] = "'$'", ["a.b"] = "'.'", ["(?<n>a)"] = "'(?<n'",
    ["(?i)a"] = "'(?i)'", ["[a[b]]"] = "'['", ["[a&&b]"] = "'&&'", ["[]a]"] = "'[]'",
    ["a{,3}"] = "'{,'", ["(*UTF)a"] = "'(*UT'", ["a\\"] = [['\']], ["(?\1a)"] = "'(?'",
  } do
    it(("pattern %q"):format(pattern), function()
      local message, code = refusal { pattern = pattern }
      assert.equal("unsupported", code)
      assert.truthy(message:find("split pattern, byte %d: " .. what:gsub("%p", "%%%0")), message)
    end)
  end
end)

describe("damaged:", function()
  local many = {}
  for i = 1, 3 do many[i] = ('{"id":%d,"content":"<s>"}'):format(258 + i) end
  local cases = {
    { "pattern", { pattern = "(a" }, "pre_tokenizer: split pattern: missing closing parenthesis" },
    { "vocab is no object", { vocab = "[]" }, "model.vocab: object expected" },
    { "text as id", { vocab = '{"a":"0"}' },
      "model.vocab: id of 'a' is 0, not an integer" },
    { "fraction as id", { vocab = '{"a":1.5}' },
      "model.vocab: id of 'a' is a number, not an integer" },
    { "negative id", { vocab = '{"a":-1}' }, "model.vocab: id -1 of 'a' is not in 0..4194303" },
    { "huge id", { vocab = '{"a":2147483648}' },
      "model.vocab: id 2147483648 of 'a' is not in 0..4194303" },
    { "id given twice", { vocab = '{"a":1,"b":1}' }, "model.vocab: id 1 of 'b' is taken already" },
    { "spelling", { vocab = '{"日本":1}' },
      "model.vocab: entry '日本': is not spelled in GPT-2's byte alphabet" },
    { "unspelled control", { vocab = '{"a\\nb":1}' },
      "model.vocab: entry 'a?b': is not spelled in GPT-2's byte alphabet" },
    { "long name", { vocab = ('{"%s":-1}'):format(("é"):rep(50)) },
      "model.vocab: id -1 of '" .. ("é"):rep(20) .. "...' is not in 0..4194303" },
    { "merges is no array", { merge_list = "{}" }, "model.merges: array expected" },
    { "merge of one", { merge_list = '[["a"]]' }, "model.merges, entry 0: two entries expected" },
    { "merge of numbers", { merge_list = '["a b",[1,2]]' },
      "model.merges, entry 1: two entries expected" },
    { "merge without space", { merge_list = '["ab"]' },
      "model.merges, entry 0: two entries expected" },
    { "missing left", { merge_list = '[["xy","a"]]' },
      "model.merges, entry 0: 'xy' + 'a': the first is not in the vocabulary" },
    { "missing right", { merge_list = '[["a","xy"]]' },
      "model.merges, entry 0: 'a' + 'xy': the second is not in the vocabulary" },
    { "missing result", { merge_list = '[["a","a"]]' },
      "model.merges, entry 0: 'a' + 'a': the result is not in the vocabulary" },
    { "added token without content", { added = { '{"id":259}' } },
      "added_tokens: token 259 has no content" },
    { "empty added token", { added = { '{"id":259,"content":""}' } },
      "added_tokens: token 259 has no content" },
    { "added token without id", { added = { '{"content":"<s>"}' } },
      "added_tokens: id of '<s>' is null, not an integer" },
    { "added token on another's id", { added = { '{"id":97,"content":"<s>"}' } },
      "added_tokens: id 97 of '<s>' already stands for 'a'" },
    { "added token twice", { added = many }, "added token '<s>' has two ids, 259 and 260" },
    { "added token like an entry", { added = { '{"id":259,"content":"abc"}' } },
      "added token 'abc' has two ids, 257 and 259" },
  }
  for _, case in ipairs(cases) do
    it(case[1], function()
      local message, code = refusal(case[2])
      assert.equal("DIR/tokenizer.json: " .. case[3], message)
      assert.equal("format", code)
    end)
  end

  it("no such file", function()
    local _, message, code = tokenizer.open("/nonexistent/dir")
    assert.equal("io", code)
    assert.truthy(message:find("/nonexistent/dir", 1, true), message)
    _, message, code = open {}
    assert.equal("io", code)
    assert.truthy(message:find("DIR/tokenizer.json", 1, true), message)
    _, message, code = tokenizer.open(("x"):rep(5000))
    assert.equal("io", code)
    assert.equal("path of 5000 bytes is too long", message)
  end)

  it("cut anywhere", function()
    local text = tiny.json()
    for n = 0, #text - 1, 37 do
      local tok, message, code = open { ["tokenizer.json"] = text:sub(1, n) }
      assert.is_nil(tok)
      assert.equal("format", code)
      assert.truthy(message:find("^DIR/tokenizer.json"), message)
    end
  end)

  it("another JSON value in place of any part", function()
    local document = assert(json.decode(tiny.json()))
    local values = { json.null, 1, -1, "x", true, json.array {}, json.object {},
      json.array { json.null }, json.object { type = json.array {} } }
    local n_read, n_refused = 0, 0
    local function try()
      local tok, message = open { ["tokenizer.json"] = json.encode(document) }
      if tok then
        n_read = n_read + 1
        tok:close()
      else
        n_refused = n_refused + 1
        assert.truthy(message:find("^DIR/tokenizer.json: [^%c]+$"), message)
      end
    end
    local function walk(node)
      local n = 0
      for key, was in pairs(node) do
        n = n + 1
        if n > 12 then break end -- of the vocabulary, a few
        for _, value in ipairs(values) do
          node[key] = value
          try()
        end
        node[key] = was
        if type(was) == "table" then walk(was) end
      end
    end
    walk(document)
    assert.truthy(n_read > 20 and n_refused > 300)
  end)
end)

describe("tokenizer_config.json", function()
  local function with(decoder)
    return open {
      ["tokenizer.json"] = tiny.json(),
      ["tokenizer_config.json"] = decoder,
    }
  end

  it("adds tokens, and may repeat them", function()
    local tok <close> = assert(with [[{"added_tokens_decoder":{
      "259":{"content":"<s>","special":true},
      "262":{"content":"<s2>","special":false,"lstrip":false}}}]])
    assert.equal(263, tok:n_vocab())
    assert.same({ 259, 262 }, tok:encode("<s><s2>"))
    assert.is_nil(tok:token_bytes(261))
    assert.is_false(tok:is_special(262))
  end)

  it("makes a token special that tokenizer.json does not", function()
    local tok <close> = assert(with
      [[{"added_tokens_decoder":{"260":{"content":"<t>","special":true}}}]])
    assert.is_true(tok:is_special(260))
  end)

  it("may declare none", function()
    assert(with "{}"):close()
    assert(with '{"added_tokens_decoder":null}'):close()
  end)

  for decoder, want in pairs {
    ["[]"] = "object expected",
    ['{"added_tokens_decoder":[]}'] = "added_tokens_decoder: object expected",
    ['{"added_tokens_decoder":{"x":{}}}'] =
      "added_tokens_decoder: 'x' is not an id with an object",
    ['{"added_tokens_decoder":{"99999999":{}}}'] =
      "added_tokens_decoder: '99999999' is not an id with an object",
    ['{"added_tokens_decoder":{"-1":{}}}'] =
      "added_tokens_decoder: '-1' is not an id with an object",
    ['{"added_tokens_decoder":{"300":1}}'] =
      "added_tokens_decoder: '300' is not an id with an object",
    ['{"added_tokens_decoder":{"300":{}}}'] = "added_tokens_decoder: token 300 has no content",
    ['{"added_tokens_decoder":{"259":{"content":"<x>"}}}'] =
      "added_tokens_decoder: id 259 of '<x>' already stands for '<s>'",
    ['{"added_tokens_decoder":{"300":{"content":"<s>"}}}'] =
      "added token '<s>' has two ids, 259 and 300",
  } do
    it("refused: " .. decoder, function()
      local tok, message, code = with(decoder)
      assert.is_nil(tok)
      assert.equal("format", code)
      local file = want:find("two ids") and "tokenizer.json" or "tokenizer_config.json"
      assert.equal(("DIR/%s: %s"):format(file, want), message)
    end)
  end

  it("is not looked at beside a file of another name", function()
    local dir = tiny.dir { ["demo.json"] = tiny.json(), ["tokenizer_config.json"] = "{" }
    assert(tokenizer.open(dir .. "/demo.json")):close()
    tiny.remove(dir)
  end)
end)
