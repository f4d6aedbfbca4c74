-- The demo tokenizer against Hugging Face tokenizers, everything exactly.
local tokenizer = require "moonlet.tokenizer"
local vectors = require "spec.text.vectors"

describe("demo tokenizer, golden vectors", function()
  local tok <const> = assert(tokenizer.open("examples/demo-model"))

  for name, n_rows in pairs {
    encode = 696, split = 539, decode = 392, stream = 240, broken_utf8 = 24,
  } do
    it("agrees on " .. name, function()
      local n, bad = vectors[name](tok, "demo")
      assert.equal(n_rows, n)
      assert.same({}, bad)
    end)
  end
end)
