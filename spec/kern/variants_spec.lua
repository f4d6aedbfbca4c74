-- Every variant of every kernel gives the bits of the plain C one.

local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local function compare(op, args, what)
  local expected = table.pack(core.kern_run("scalar", op, args))
  for _, variant in ipairs(core.kernels()) do
    local got = table.pack(core.kern_run(variant.name, op, args))
    assert.equal(expected.n, got.n)
    for i = 1, expected.n do
      local a, b = expected[i], got[i]
      if type(a) == "number" then a, b = string.pack("<f", a), string.pack("<f", b) end
      local difference
      if op == "f16_encode" then
        difference = a ~= b and "other bits" or nil
      else
        difference = numbers.difference(a, b)
      end
      if difference then
        error(("%s, %s, %s, result %d: %s"):format(variant.name, op, what, i, difference), 2)
      end
    end
  end
end

--- Calls f(random bytes of n floats, n) for ordinary and awkward numbers of every length.
local function each_input(f)
  local rng = numbers.rng(7)
  for _, n in ipairs(numbers.lengths) do
    f(function(count, scale) return numbers.pack(rng.floats(count or n, scale)) end, n)
    f(function(count) return numbers.pack(rng.awkward(count or n)) end, n)
  end
end

describe("kernels", function()
  it("are listed, plain C first", function()
    local list = core.kernels()
    assert.equal("scalar", list[1].name)
    for _, variant in ipairs(list) do
      assert.is_true(variant.usable)
      assert.is_string(variant.level)
    end
  end)

  it("refuse names they do not have", function()
    assert.has_error(function() core.kern_run("sse9", "silu", { x = "" }) end,
      "no kernels named 'sse9' here")
    assert.has_error(function() core.kern_run("scalar", "sin", { x = "" }) end,
      "no kernel named 'sin'")
  end)
end)

describe("every variant agrees to the bit on", function()
  it("activations", function()
    each_input(function(some, n)
      compare("silu", { x = some(nil, 100) }, n)
      compare("silu_mul", { gate = some(), up = some() }, n)
      compare("sigmoid_mul", { x = some(), gate = some(nil, 30) }, n)
    end)
  end)

  it("exp between its limits and around them", function()
    local values = {}
    for i = 0, 1999 do values[i + 1] = -104 + i * 0.104 end
    compare("sigmoid_mul",
      { x = numbers.pack(values), gate = numbers.pack(values) }, "a grid")
  end)

  it("norms", function()
    each_input(function(some, n)
      compare("rms_norm", { x = some(), eps = 1e-6 }, n)
      compare("rms_norm", { x = some(), weight = some(), eps = 1e-6 }, n)
      compare("l2_norm", { x = some(), eps = 1e-6, scale = 0.125 }, n)
    end)
  end)

  it("axpy", function()
    each_input(function(some, n)
      compare("axpy", { a = 0.3, x = some(), y = some() }, n)
      compare("axpby", { a = 0.3, b = -1.7, x = some(), acc = some() }, n)
    end)
  end)

  it("softmax", function()
    each_input(function(some, n) compare("softmax", { x = some(nil, 20) }, n) end)
    for n = 1, 40 do
      compare("softmax", { x = numbers.pack({ -1 / 0 }):rep(n) }, "nothing allowed")
      compare("softmax", { x = numbers.pack({ -1 / 0 }):rep(n) .. numbers.pack({ 3 }) }, "one left")
    end
  end)

  it("convolutions of any width", function()
    each_input(function(some, n)
      for k = 1, 5 do compare("conv_silu", { rows = some(n * k), w = some(n * k), k = k }, n) end
    end)
  end)

  it("the delta rule", function()
    each_input(function(some, dk)
      for _, shape in ipairs { { 1, 1 }, { 3, 2 }, { 9, 3 } } do
        local dv, n = table.unpack(shape)
        compare("delta_rule", { S = some(dk * dv), q = some(dk * n), k = some(dk * n),
          v = some(dv * n), decay = some(n), beta = some(n) }, dk .. " x " .. dv)
      end
    end)
  end)

  it("a token of the delta rule, however many come at once", function()
    local rng = numbers.rng(3)
    local dk, dv, n = 128, 13, 5
    local function row(bytes, width, t) return bytes:sub(t * width * 4 + 1, (t + 1) * width * 4) end
    local args = { S = numbers.pack(rng.floats(dk * dv)), q = numbers.pack(rng.floats(dk * n)),
      k = numbers.pack(rng.floats(dk * n)), v = numbers.pack(rng.floats(dv * n)),
      decay = numbers.pack(rng.floats(n)), beta = numbers.pack(rng.floats(n)) }
    for _, variant in ipairs(core.kernels()) do
      local S, out = core.kern_run(variant.name, "delta_rule", args)
      local one = args.S
      for t = 0, n - 1 do
        local o
        one, o = core.kern_run(variant.name, "delta_rule", { S = one, q = row(args.q, dk, t),
          k = row(args.k, dk, t), v = row(args.v, dv, t), decay = row(args.decay, 1, t),
          beta = row(args.beta, 1, t) })
        assert.equal(row(out, dv, t), o)
      end
      assert.equal(S, one)
    end
  end)

  it("attention of any shape", function()
    local rng = numbers.rng(21)
    local function pages(kind, dim, f16)
      local list, n = {}, 32 * dim
      for i = 1, 8 do
        list[i] = numbers.pack(rng[kind](n, nil))
        if f16 then list[i] = core.kern_run("scalar", "f16_encode", { x = list[i] }) end
      end
      return list
    end
    local lengths = { 1, 31, 32, 33, 100, 255, 256 }
    for turn, dim in ipairs { 1, 8, 16, 17, 32, 40, 64, 100, 256 } do
      for _, f16 in ipairs { false, true } do
        for _, kind in ipairs { "floats", "awkward" } do
          local n, n_q = lengths[turn % #lengths + 1], (turn * 5 + (f16 and 1 or 0)) % 13 + 1
          compare("attend", { keys = pages(kind, dim, f16), values = pages(kind, dim, f16),
            f16 = f16, n = n, dim = dim, q = numbers.pack(rng[kind](n_q * dim, nil)),
            scale = dim ^ -0.5 }, ("%d x %d x %d"):format(n, dim, n_q))
        end
      end
    end
  end)

  it("a query, however many meet the keys at once", function()
    local rng = numbers.rng(22)
    local dim, n_q, page = 48, 15, function() return numbers.pack(rng.floats(32 * 48)) end
    local args = { keys = { page(), page() }, values = { page(), page() }, n = 50, dim = dim,
      q = numbers.pack(rng.floats(n_q * dim)), scale = 0.2 }
    for _, variant in ipairs(core.kernels()) do
      local all = core.kern_run(variant.name, "attend", args)
      for t = 0, n_q - 1 do
        local own = { q = args.q:sub(t * dim * 4 + 1, (t + 1) * dim * 4) }
        for k, v in pairs(args) do own[k] = own[k] or v end
        assert.equal(all:sub(t * dim * 4 + 1, (t + 1) * dim * 4),
          (core.kern_run(variant.name, "attend", own)))
      end
    end
  end)

  it("f16 in both directions", function()
    each_input(function(some, n) compare("f16_encode", { x = some() }, n) end)
    local all = {}
    for code = 0, 65535 do all[#all + 1] = string.pack("<I2", code) end
    compare("f16_decode", { x = table.concat(all) }, "all codes")
    for n = 1, 40 do compare("f16_decode", { x = table.concat(all, "", 1000, 999 + n) }, n) end
  end)

  it("f16 ties and subnormals", function()
    local values = {}
    for code = 0, 0x7bff do
      local a = string.unpack("<f", (core.kern_run("scalar", "f16_decode",
        { x = string.pack("<I2", code) })))
      values[#values + 1] = a
      values[#values + 1] = -a * (1 + 0x1p-11)
    end
    compare("f16_encode", { x = numbers.pack(values) }, "between neighbours")
  end)

  it("dots of any shape", function()
    local rng = numbers.rng(11)
    for _, cols in ipairs(numbers.lengths) do
      for rows = 1, 8 do
        local n_x = 1 + (rows * 5 + cols) % 7
        local ldw, ldx = cols + rows % 3, cols + n_x % 2
        for _, kind in ipairs { "floats", "awkward" } do
          compare("dots", {
            w = numbers.pack(rng[kind]((rows - 1) * ldw + cols)),
            x = numbers.pack(rng[kind]((n_x - 1) * ldx + cols, nil)),
            rows = rows, n_x = n_x, cols = cols, ldw = ldw, ldx = ldx,
          }, ("%d x %d x %d"):format(rows, n_x, cols))
        end
      end
    end
  end)
end)
