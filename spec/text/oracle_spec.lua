-- The full-size vocabularies against Hugging Face tokenizers; see spec/golden/text/README.md.
local oracle = require "spec.support.oracle"
local tokenizer = require "moonlet.tokenizer"
local vectors = require "spec.text.vectors"

describe("full-size tokenizers #oracle", function()
  for key, known in pairs {
    qwen35 = { n_vocab = 248070, hello = 9419 },
    qwen3s = { n_vocab = 151669, hello = 9707 },
  } do
    it(key .. " agrees on every vector", function()
      local begin = os.clock()
      local tok <close> = assert(tokenizer.open(("%s/tokenizer-%s.json"):format(oracle.dir(),
        key)))
      assert.truthy(os.clock() - begin < 5)
      assert.equal(known.n_vocab, tok:n_vocab())
      assert.same({ known.hello }, tok:encode("Hello"))
      for name, n_rows in pairs {
        encode = 696, split = 539, decode = 226, stream = 198, broken_utf8 = 24,
      } do
        local n, bad = vectors[name](tok, key)
        assert.equal(n_rows, n)
        assert.same({}, bad)
      end
    end)
  end

  it("the chat prompt of the released model has its known ids", function()
    local tok <close> = assert(tokenizer.open(oracle.dir() .. "/tokenizer-qwen35.json"))
    local prompt = "<|im_start|>user\nHello, how are you?<|im_end|>\n<|im_start|>assistant\n" ..
      "<think>\n\n</think>\n\n"
    assert.same({ 248045, 846, 198, 9419, 11, 1204, 513, 488, 30, 248046, 198, 248045, 74455, 198,
      248068, 271, 248069, 271 }, tok:encode(prompt))
  end)
end)
