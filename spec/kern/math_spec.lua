-- The kernels compute what their formulas say: compared with doubles, within rounding.

local core = require "moonlet.core"
local numbers = require "spec.support.numbers"
local pages_of = require "spec.support.kv_pages"

local EPS = 0x1p-24 -- half an ulp of 1

--- Rounds to f32.
local function f32(x) return (string.unpack("<f", string.pack("<f", x))) end

local function rounded(values)
  local t = {}
  for i, v in ipairs(values) do t[i] = f32(v) end
  return t
end

local function near(expected, got, bound, what)
  local ok = math.abs(expected - got) <= bound -- false for a NaN
  if not ok then
    error(("%s: %.9g, expected %.9g within %.3g"):format(what, got, expected, bound), 2)
  end
end

local function each_variant(f)
  for _, variant in ipairs(core.kernels()) do
    f(function(op, args) return core.kern_run(variant.name, op, args) end, variant.name)
  end
end

--- Sum of a[ai + j] * b[bi + j], and of the products' sizes.
local function dot(a, ai, b, bi, n)
  local sum, size = 0, 0
  for j = 1, n do
    local p = a[ai + j] * b[bi + j]
    sum, size = sum + p, size + math.abs(p)
  end
  return sum, size
end

describe("exp", function()
  local function ulp(x) return 2 ^ (math.floor(math.log(x, 2)) - 23) end

  it("is within 2 ulp where it is finite", function()
    local rng = numbers.rng(1)
    for _ = 1, 50000 do
      local x = f32(rng.uniform() * 175 - 87)
      local e = math.exp(x)
      near(e, core.kern_value("exp", x), 2 * ulp(e), "exp " .. x)
    end
  end)

  it("has its limits", function()
    assert.equal(1, core.kern_value("exp", 0))
    assert.equal(1, core.kern_value("exp", -0.0))
    assert.equal(1 / 0, core.kern_value("exp", 89))
    assert.equal(1 / 0, core.kern_value("exp", 1 / 0))
    assert.equal(0, core.kern_value("exp", -88))
    assert.equal(0, core.kern_value("exp", -1 / 0))
    local nan = core.kern_value("exp", 0 / 0)
    assert.is_true(nan ~= nan)
    assert.is_true(core.kern_value("exp", 88.7228) < 1 / 0)
    assert.is_true(core.kern_value("exp", -87.3365) > 0)
  end)

  it("carries sigmoid and softplus", function()
    for x = -80, 80, 0.37 do
      x = f32(x)
      local s = 1 / (1 + math.exp(-x))
      near(s, core.kern_value("sigmoid", x), 4 * s * 2 * EPS, "sigmoid " .. x)
      local p = math.max(x, 0) + math.log(1 + math.exp(-math.abs(x)))
      if math.exp(x) < 1e-8 then p = math.exp(x) end
      near(p, core.kern_value("softplus", x), 6 * p * EPS, "softplus " .. x)
    end
    assert.equal(0, core.kern_value("sigmoid", -1 / 0))
    assert.equal(1, core.kern_value("sigmoid", 1 / 0))
    assert.equal(1 / 0, core.kern_value("softplus", 1 / 0))
    assert.equal(0, core.kern_value("softplus", -1 / 0))
  end)
end)

describe("dots", function()
  it("are the sums of products", function()
    local rng = numbers.rng(2)
    for _, cols in ipairs { 1, 15, 16, 17, 100, 1000 } do
      local rows, n_x = 7, 5
      local w, x = rounded(rng.floats(rows * cols)), rounded(rng.floats(n_x * cols))
      each_variant(function(run, name)
        local y = numbers.unpack(run("dots", { w = numbers.pack(w), x = numbers.pack(x),
          rows = rows, n_x = n_x, cols = cols }))
        for t = 0, n_x - 1 do
          for r = 0, rows - 1 do
            local sum, size = dot(w, r * cols, x, t * cols, cols)
            -- a chain of cols/16 roundings and four levels of the tree
            near(sum, y[t * rows + r + 1], (cols // 16 + 6) * EPS * size, name .. " " .. cols)
          end
        end
      end)
    end
  end)

  it("follow the order of summation that the header defines", function()
    -- 16 lanes; within a lane in rising order; then 8, 4, 2, 1 apart. Any other order differs.
    local big = 2 ^ 24
    local w = {}
    for j = 1, 48 do w[j] = 0 end
    w[1], w[17], w[33] = big, 1, 1 -- lane 0: big + 1 rounds to big, twice
    w[9] = 2                       -- lane 8 joins lane 0 first
    w[5] = -big                    -- lane 4 after that
    local args = { w = numbers.pack(w), x = numbers.pack({ 1 }):rep(48), cols = 48 }
    each_variant(function(run)
      assert.equal(2.0, numbers.unpack(run("dots", args))[1])
    end)
    w[9], w[2] = 0, 2 -- lane 1 comes last: nothing is lost, the same sum
    w[17], w[33] = 2, 0
    args.w = numbers.pack(w)
    each_variant(function(run)
      assert.equal(4.0, numbers.unpack(run("dots", args))[1])
    end)
  end)
end)

describe("axpy", function()
  it("rounds each product once with its sum", function()
    local rng = numbers.rng(8)
    local n, a = 37, f32(0.3)
    local x, y = rounded(rng.floats(n)), rounded(rng.floats(n))
    each_variant(function(run)
      local got = numbers.unpack(run("axpy", { a = a, x = numbers.pack(x), y = numbers.pack(y) }))
      -- a double holds the product but not always the sum: once in 2^29 it rounds twice
      for i, v in ipairs(got) do assert.equal(f32(y[i] + a * x[i]), v) end
    end)
  end)

  it("has a form that scales what it adds to, and rounds that first", function()
    local rng = numbers.rng(9)
    local n, a, b = 37, f32(0.7), f32(-0.3)
    local x, acc = rounded(rng.floats(n)), rounded(rng.floats(n))
    each_variant(function(run)
      local got = numbers.unpack(run("axpby",
        { b = b, x = numbers.pack(x), a = a, acc = numbers.pack(acc) }))
      for i, v in ipairs(got) do assert.equal(f32(b * x[i] + f32(a * acc[i])), v) end
    end)
  end)
end)

describe("norms", function()
  it("are what they are called", function()
    local rng = numbers.rng(3)
    for _, n in ipairs { 1, 16, 100, 1000 } do
      local x, weight = rounded(rng.floats(n, 3)), rounded(rng.floats(n))
      local squares = dot(x, 0, x, 0, n)
      each_variant(function(run, name)
        local y = numbers.unpack(run("rms_norm",
          { x = numbers.pack(x), weight = numbers.pack(weight), eps = 1e-6 }))
        local z = numbers.unpack(run("l2_norm", { x = numbers.pack(x), eps = 1e-6, scale = 0.3 }))
        for i = 1, n do
          local e = x[i] / math.sqrt(squares / n + 1e-6) * weight[i]
          near(e, y[i], 100 * EPS * math.abs(e), name .. " rms_norm")
          e = x[i] / math.sqrt(squares + 1e-6) * 0.3
          near(e, z[i], 100 * EPS * math.abs(e), name .. " l2_norm")
        end
      end)
    end
  end)
end)

describe("activations", function()
  it("multiply by sigmoid and silu", function()
    local rng = numbers.rng(4)
    local x, other = rounded(rng.floats(100, 10)), rounded(rng.floats(100))
    local bytes, other_bytes = numbers.pack(x), numbers.pack(other)
    each_variant(function(run, name)
      local s = numbers.unpack(run("silu", { x = bytes }))
      local m = numbers.unpack(run("silu_mul", { gate = bytes, up = other_bytes }))
      local g = numbers.unpack(run("sigmoid_mul", { x = other_bytes, gate = bytes }))
      for i = 1, 100 do
        local sigmoid = 1 / (1 + math.exp(-x[i]))
        near(x[i] * sigmoid, s[i], 8 * EPS * math.abs(x[i] * sigmoid), name .. " silu")
        local e = x[i] * sigmoid * other[i]
        near(e, m[i], 10 * EPS * math.abs(e), name .. " silu_mul")
        e = other[i] * sigmoid
        near(e, g[i], 10 * EPS * math.abs(e), name .. " sigmoid_mul")
      end
    end)
  end)

  it("end a convolution whose last tap is the current token", function()
    local rng = numbers.rng(5)
    local n, k = 37, 4
    local rows, w = rounded(rng.floats(n * k)), rounded(rng.floats(n * k))
    each_variant(function(run, name)
      local y = numbers.unpack(run("conv_silu",
        { rows = numbers.pack(rows), w = numbers.pack(w), k = k }))
      for c = 0, n - 1 do
        local sum, size = 0, 0
        for j = 0, k - 1 do
          local p = w[c * k + j + 1] * rows[j * n + c + 1]
          sum, size = sum + p, size + math.abs(p)
        end
        near(sum / (1 + math.exp(-sum)), y[c + 1], 12 * EPS * size, name .. " conv_silu")
      end
    end)
  end)
end)

describe("softmax", function()
  it("is exp(x) over its sum, and tells the logarithm of that sum", function()
    local rng = numbers.rng(6)
    for _, n in ipairs { 1, 16, 50, 333 } do
      local x = rounded(rng.floats(n, 12))
      if n > 16 then x[3] = -1 / 0 end
      local sum = 0
      for i = 1, n do sum = sum + math.exp(x[i]) end
      each_variant(function(run, name)
        local bytes, lse = run("softmax", { x = numbers.pack(x) })
        local y = numbers.unpack(bytes)
        near(math.log(sum), lse, 60 * EPS * math.max(1, math.abs(math.log(sum))), name .. " lse")
        for i = 1, n do
          local e = math.exp(x[i]) / sum
          near(e, y[i], 60 * EPS * e, name .. " softmax")
        end
      end)
    end
  end)

  it("gives zeros where nothing is allowed", function()
    each_variant(function(run)
      local bytes, lse = run("softmax", { x = numbers.pack { -1 / 0, -1 / 0, -1 / 0 } })
      assert.same({ 0, 0, 0 }, numbers.unpack(bytes))
      assert.equal(-1 / 0, lse)
    end)
  end)
end)

describe("the delta rule", function()
  -- One token in doubles, S [dv][dk] in place; returns S q.
  local function step(S, dk, q, k, v, decay, beta)
    local out = {}
    for i = 0, #v - 1 do
      local r = 0
      for j = 1, dk do r = r + decay * S[i * dk + j] * k[j] end
      local d, sum = beta * (v[i + 1] - r), 0
      for j = 1, dk do
        S[i * dk + j] = decay * S[i * dk + j] + d * k[j]
        sum = sum + S[i * dk + j] * q[j]
      end
      out[i + 1] = sum
    end
    return out
  end

  it("is S <- decay S; S <- S + beta (v - S k) k^T; out = S q, token after token", function()
    local rng = numbers.rng(7)
    for _, shape in ipairs { { 128, 4, 1 }, { 20, 3, 2 }, { 16, 16, 5 }, { 128, 9, 3 } } do
      local dk, dv, n = table.unpack(shape)
      local S0, v = rounded(rng.floats(dk * dv)), rounded(rng.floats(dv * n))
      local q, k = rounded(rng.floats(dk * n, 0.2)), rounded(rng.floats(dk * n, 0.2))
      local decay, beta = rounded(rng.floats(n, 0.9)), rounded(rng.floats(n, 0.6))
      local S, expected = table.move(S0, 1, #S0, 1, {}), {}
      for t = 0, n - 1 do
        local function row(a, width) return { table.unpack(a, t * width + 1, (t + 1) * width) } end
        local out = step(S, dk, row(q, dk), row(k, dk), row(v, dv), decay[t + 1], beta[t + 1])
        table.move(out, 1, dv, t * dv + 1, expected)
      end
      each_variant(function(run, name)
        local bytes, out = run("delta_rule", { S = numbers.pack(S0), q = numbers.pack(q),
          k = numbers.pack(k), v = numbers.pack(v), decay = numbers.pack(decay),
          beta = numbers.pack(beta) })
        for i, got in ipairs(numbers.unpack(bytes)) do
          near(S[i], got, 20 * n * EPS, name .. " S")
        end
        for i, got in ipairs(numbers.unpack(out)) do
          near(expected[i], got, 100 * n * EPS, name .. " out")
        end
      end)
    end
  end)
end)

describe("attention", function()
  it("is a softmax of scaled products, and what it takes to merge blocks", function()
    local rng = numbers.rng(12)
    for _, shape in ipairs { { 1, 8, 1 }, { 33, 20, 3 }, { 256, 64, 4 }, { 250, 16, 9 } } do
      local n, dim, n_q = table.unpack(shape)
      local keys, values = rounded(rng.floats(n * dim)), rounded(rng.floats(n * dim))
      local q, scale = rounded(rng.floats(n_q * dim, 4)), f32(dim ^ -0.5)
      local args = { keys = pages_of(keys, dim, n, true), values = pages_of(values, dim, n),
        n = n, dim = dim, q = numbers.pack(q), scale = scale }
      each_variant(function(run, name)
        local out, top, sum = run("attend", args)
        out, top, sum = numbers.unpack(out), numbers.unpack(top), numbers.unpack(sum)
        for t = 0, n_q - 1 do
          local s, best, total = {}, -1 / 0, 0
          for j = 0, n - 1 do
            s[j] = scale * dot(q, t * dim, keys, j * dim, dim)
            best = math.max(best, s[j])
          end
          near(best, top[t + 1], 1e-5, name .. " top")
          for j = 0, n - 1 do total = total + math.exp(s[j] - best) end
          near(total, sum[t + 1], 1e-5 * total, name .. " sum")
          for d = 1, dim do
            local e = 0
            for j = 0, n - 1 do e = e + math.exp(s[j] - best) * values[j * dim + d] end
            near(e, out[t * dim + d], 2e-5 * total, name .. " out")
          end
        end
      end)
    end
  end)

  it("gives nothing where every score is -inf", function()
    local dim, n = 4, 3
    local values = {}
    for i = 1, n * dim do values[i] = i end
    local args = { keys = pages_of({ -1 / 0, 0, 0, 0, -1 / 0, 0, 0, 0, -1 / 0, 0, 0, 0 }, dim, n,
      true), values = pages_of(values, dim, n), n = n, dim = dim, q = numbers.pack { 1, 1, 1, 1 },
      scale = 1 }
    each_variant(function(run)
      local out, top, sum = run("attend", args)
      assert.same({ 0, 0, 0, 0 }, numbers.unpack(out))
      assert.equal(-1 / 0, numbers.unpack(top)[1])
      assert.equal(0, numbers.unpack(sum)[1])
    end)
  end)
end)
