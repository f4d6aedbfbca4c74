-- The demo tokenizer against Hugging Face tokenizers, everything exactly.
local json = require "moonlet.json"
local tiny = require "spec.text.tiny"
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

it("added tokens behind NFC agree", function()
  local function read(path)
    local file <close> = assert(io.open(path))
    return assert(json.decode(file:read("a")))
  end
  local spec = read("examples/demo-model/tokenizer.json")
  table.move(read("spec/golden/text/normalized.added_tokens.json"), 1, 10,
    #spec.added_tokens + 1, spec.added_tokens)
  local dir = tiny.dir { ["tokenizer.json"] = json.encode(spec) }
  local tok <close> = assert(tokenizer.open(dir))
  tiny.remove(dir)
  local n, bad = vectors.encode(tok, "demo", "normalized")
  assert.equal(300, n)
  assert.same({}, bad)
end)
