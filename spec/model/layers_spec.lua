-- Passes that finish a layer before they begin the next one give the bits of a session.
local core = require "moonlet.core"
local golden = require "spec.support.golden"
local numbers = require "spec.support.numbers"

local MOE <const> = "spec/golden/models/moe-wrapped/hf"

-- Sequences of awkward lengths: more than a batch, one token, a few.
local function some_sequences(vocab)
  local rng, list = numbers.rng(7), {}
  for i, n in ipairs { 300, 1, 7, 257 } do
    local ids, targets = {}, {}
    for t = 1, n do
      ids[t] = math.floor(rng.uniform() * vocab)
      targets[t] = t % 3 == 0 and -1 or math.floor(rng.uniform() * vocab)
    end
    list[i] = { ids = ids, targets = targets }
  end
  return list
end

local function ids_of(list)
  local all = {}
  for i, sequence in ipairs(list) do all[i] = sequence.ids end
  return all
end

-- Steps through all layers; rows[depth] is the stream after `depth` of them.
local function run(layers, n_sequences)
  local rows, done, total = {}, 0, 1
  while done < total do
    done, total = layers:step()
    assert(done, total)
    if done % n_sequences == 0 then rows[done // n_sequences] = layers:rows() end
  end
  return rows
end

local function bytes_from(tensor, row, n)
  local H = tensor:shape()[2]
  return tensor:bytes():sub(row * H * 4 + 1, (row + n) * H * 4)
end

local function check(dir, options)
  local model <close> = assert(core.model_open(dir, { threads = 2 }))
  local info = model:info()
  local list = some_sequences(info.config.vocab_size)
  local layers <close> = assert(model:layers(ids_of(list), options))
  local rows = run(layers, #list)
  assert.equal(#info.config.layer_types + 1, #rows)
  local first = 0
  for i, sequence in ipairs(list) do
    local n = #sequence.ids
    local out = assert(model:forward(sequence.ids, { "hidden" }))
    local _, _, H = table.unpack(out.hidden:shape())
    local hidden = out.hidden:bytes()
    for depth = 1, #rows - 1 do
      local expected = hidden:sub(depth * n * H * 4 + 1, (depth + 1) * n * H * 4)
      assert(expected == bytes_from(rows[depth], first, n),
        ("sequence %d differs after %d layers"):format(i, depth))
    end
    assert(out.final:bytes() == bytes_from(rows[#rows], first, n))

    local session <close> = assert(model:session { ctx = n, kv = "f32" })
    local nll = assert(session:score(sequence.ids, sequence.targets))
    assert.is_true(nll:bytes() == assert(layers:score(i, sequence.targets)):bytes())
    session:reset()
    local final = assert(session:final(sequence.ids, sequence.targets))
    assert.is_true(final:bytes() == layers:final(i, sequence.targets):bytes())
    first = first + n
  end
end

describe("layer after layer", function()
  for _, dir in ipairs { "models/dense-text/hf", "models/dense-tied/hf", "models/moe-text/hf",
    "models/moe-wrapped/hf", "mlx/moe4/mlx", "mlx/dense4/mlx", "ct/model-mixed/checkpoint" } do
    it("gives the bits of sessions: " .. dir, function() check("spec/golden/" .. dir) end)
  end

  it("keeps its rows in a file of the directory it is given, which shows nowhere", function()
    local dir = os.tmpname()
    os.remove(dir)
    assert(os.execute("mkdir " .. dir))
    check(MOE, { scratch = dir })
    local pipe <close> = assert(io.popen("ls -A " .. dir))
    assert.equal("", pipe:read("a"))
    os.execute("rm -r " .. dir)
    local model <close> = assert(core.model_open(MOE))
    local layers, message, code = model:layers({ { 1 } }, { scratch = dir })
    assert.is_nil(layers)
    assert.equal("io", code)
    assert.matches(dir .. ": cannot make a scratch file", message, 1, true)
  end)

  it("takes no cache rows from sequence to sequence", function()
    local model <close> = assert(core.model_open(MOE))
    local alone <close> = assert(model:layers { { 5, 6, 7 } })
    local after <close> = assert(model:layers { { 1, 2, 3, 4, 5 }, { 5, 6, 7 } })
    local rows, more = run(alone, 1), run(after, 2)
    assert.is_true(bytes_from(rows[#rows], 0, 3) == bytes_from(more[#more], 5, 3))
  end)

  it("refuses what no session takes", function()
    local model <close> = assert(core.model_open(MOE))
    local function refused(sequences, code, pattern)
      local layers, message, got = model:layers(sequences)
      assert.is_nil(layers)
      assert.equal(code, got)
      assert.matches(pattern, message)
    end
    refused({}, "range", "no tokens")
    refused({ { 1 }, {} }, "range", "sequence 1 has no tokens")
    refused({ { 1 }, { 2, 320 } }, "range", "token id 320")
    refused({ { -1 } }, "range", "token id %-1")
    local long = {}
    for i = 1, 513 do long[i] = 1 end
    refused({ long }, "limit", "1 to 512")
    assert.error_matches(function() model:layers { 1 } end, "sequence 1: list of token ids")
  end)

  it("scores only when every step is done, and only tokens that there are", function()
    local model <close> = assert(core.model_open(MOE))
    local layers <close> = assert(model:layers { { 1, 2 } })
    assert.error_matches(function() layers:score(1, { 1, -1 }) end, "steps are left")
    run(layers, 1)
    assert.error_matches(function() layers:score(2, { 1 }) end, "no such sequence")
    assert.error_matches(function() layers:score(1, { 1 }) end, "one target for each id")
    local nll, message, code = layers:score(1, { 1, 320 })
    assert.is_nil(nll)
    assert.equal("range", code)
    assert.matches("target id 320", message)
    local floats = golden.floats(layers:score(1, { -1, -1 }))
    assert.same({ 0, 0 }, floats)
  end)

  it("outlives nothing that is closed", function()
    local model = assert(core.model_open(MOE))
    local layers = assert(model:layers { { 1, 2 } })
    model:close()
    assert.error_matches(function() layers:step() end, "closed model")
    layers:close()
    assert.error_matches(function() layers:step() end, "closed layers")
  end)
end)
