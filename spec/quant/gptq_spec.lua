local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local golden = require "spec.support.golden"
local numbers = require "spec.support.numbers"

local FORMATS = {
  affine2 = { mode = "affine", bits = 2, group = 128 },
  affine3 = { mode = "affine", bits = 3, group = 64 },
  affine4 = { mode = "affine", bits = 4, group = 32 },
  mxfp4 = { mode = "mxfp4", bits = 4, group = 32 },
  mxfp8 = { mode = "mxfp8", bits = 8, group = 32 },
  nvfp4 = { mode = "nvfp4", bits = 4, group = 16 },
}

local function counts(...) return string.pack("<" .. ("i8"):rep(select("#", ...)), ...) end

local function entries(rows, cols, f)
  local list = { { name = "w", dtype = "U32", shape = { rows, cols * f.bits // 32 } } }
  for _, name in ipairs(f.mode == "affine" and { "s", "b" } or { "s" }) do
    list[#list + 1] = { name = name, dtype = f.mode == "affine" and "BF16" or "U8",
      shape = { rows, cols // f.group } }
  end
  return list
end

-- What a put makes of weights [rows][cols]: its arrays, and how many Hessians were lost. `inputs`:
-- { data =, shape =, counts = } of the Hessian, or nil for none.
local function put(weights, cols, f, inputs, job)
  local dir = checkpoint.directory()
  local _ <close> = setmetatable({}, { __close = function() checkpoint.remove(dir) end })
  local rows = #weights // cols
  checkpoint.write(dir .. "/in.safetensors",
    { w = { dtype = "F32", shape = { rows, cols }, data = numbers.pack(weights) } })
  job = job or {}
  local writer <close> = assert(core.quant_open(dir .. "/in.safetensors", job.threads or 1))
  job.threads = nil
  if inputs then
    checkpoint.write(dir .. "/h.safetensors", {
      inputs = { dtype = inputs.dtype or "F32", shape = inputs.shape or { cols, cols },
        data = inputs.data },
      ["inputs.counts"] = { dtype = "I64", shape = { #inputs.counts // 8 }, data = inputs.counts },
    })
    assert(writer:hessians(dir .. "/h.safetensors"))
    job.hessian = "inputs"
  end
  assert(writer:create(dir .. "/out.safetensors", entries(rows, cols, f), "mlx"))
  job.op, job.mode, job.bits, job.group, job.cols = "encode", f.mode, f.bits, f.group, cols
  job.entry, job.part_rows = 1, job.part_rows or rows
  job.parts = job.parts or { { name = "w", first_row = 0 } }
  local ok, message, code = writer:put(job) -- message: the number, if ok
  if not ok then return nil, message, code end
  assert(writer:finish())
  local out = checkpoint.read(dir .. "/out.safetensors")
  return { w = out.w.data, s = out.s.data, b = out.b and out.b.data }, message
end

local function decode(out, rows, cols, f)
  return numbers.unpack(assert(core.dequantize_tensor({ weight = out.w, scales = out.s,
    biases = out.b }, { rows = rows, cols = cols, mode = f.mode, bits = f.bits, group = f.group,
    dtype = "f32", scale_dtype = f.mode == "affine" and "bf16" or nil })))
end

-- e H e^T of each row of W - W'; H with the documented share of its mean diagonal added.
local function costs(weights, values, H, n_inputs, cols)
  local mean, list = 0, {}
  for i = 0, cols - 1 do mean = mean + H[i * cols + i + 1] / cols end
  local damping = mean * (0.01 + 0.1 * cols / n_inputs)
  for first = 0, #weights - 1, cols do
    local cost = 0
    for i = 1, cols do
      local e, sum = weights[first + i] - values[first + i], 0
      for j = 1, cols do
        sum = sum + H[(i - 1) * cols + j] * (weights[first + j] - values[first + j])
      end
      cost = cost + e * (sum + damping * e)
    end
    list[#list + 1] = cost
  end
  return list
end

local function sum(list)
  local s = 0
  for _, x in ipairs(list) do s = s + x end
  return s
end

-- Inputs whose neighbours are correlated at r.
local function chain(cols, r)
  local H = {}
  for i = 0, cols - 1 do
    for j = 0, cols - 1 do H[i * cols + j + 1] = 1000 * r ^ math.abs(i - j) end
  end
  return H
end

local function normal(rng, n)
  local values = {}
  for i = 1, n do
    values[i] = 0.05 * math.sqrt(-2 * math.log(1 - rng.uniform()))
      * math.cos(2 * math.pi * rng.uniform())
  end
  return numbers.unpack(numbers.pack(values))
end

describe("encoding with error feedback", function()
  local case = golden.open("spec/golden/gptq/cases.safetensors")

  for name, f in pairs(FORMATS) do
    it("costs what the paper's form of GPTQ costs, " .. name, function()
      local inputs = { data = numbers.pack(case.inputs), counts = counts(512) }
      local values = decode(assert(put(case.weight, 128, f, inputs)), 16, 128, f)
      local cost = sum(costs(case.weight, values, case.inputs, 512, 128))
      local want = case["cost." .. name][1]
      assert.is_true(math.abs(cost / want - 1) < 0.02, ("%g, golden %g"):format(cost, want))
    end)
  end

  it("takes at least 15 percent off a least-squares fit where inputs are correlated", function()
    local rng, cols, f = numbers.rng(3), 256, FORMATS.affine3
    local H, weights = chain(cols, 0.9), normal(rng, 8 * cols)
    local inputs = { data = numbers.pack(H), counts = counts(100000) }
    local function cost(with)
      return sum(costs(weights, decode(assert(put(weights, cols, f, with, { fit = "mse" })), 8,
        cols, f), H, 100000, cols))
    end
    assert.is_true(cost(inputs) < 0.85 * cost())
  end)

  it("is never dearer than the plain fit, row by row", function()
    local rng = numbers.rng(5)
    for name, f in pairs(FORMATS) do
      local weights = normal(rng, 8 * 128)
      for i = 1, 128 do weights[i] = (i % 3 - 1) * 0.25 end -- a row that its format holds exactly
      for _, r in ipairs { 0, 0.3, 0.9 } do
        local H = chain(128, r)
        local inputs = { data = numbers.pack(H), counts = counts(1000) }
        local fed = costs(weights, decode(put(weights, 128, f, inputs), 8, 128, f), H, 1000, 128)
        local plain = costs(weights, decode(put(weights, 128, f), 8, 128, f), H, 1000, 128)
        for i = 1, 8 do
          assert.is_true(fed[i] <= plain[i] * 1.0001 + 1e-9, ("%s row %d"):format(name, i))
        end
      end
    end
  end)

  it("changes nothing where inputs have nothing to do with each other", function()
    local weights = normal(numbers.rng(6), 4 * 128)
    for _, name in ipairs { "mxfp4", "mxfp8", "nvfp4" } do
      local inputs = { data = numbers.pack(chain(128, 0)), counts = counts(1000) }
      assert.same(put(weights, 128, FORMATS[name]), put(weights, 128, FORMATS[name], inputs))
    end
  end)

  it("does not depend on the number of threads", function()
    local weights = normal(numbers.rng(7), 300 * 256)
    local inputs = { data = numbers.pack(chain(256, 0.8)), counts = counts(1000) }
    assert.same((put(weights, 256, FORMATS.affine4, inputs)),
      (put(weights, 256, FORMATS.affine4, inputs, { threads = 3 })))
  end)

  it("gives the same bytes on every processor", function()
    local dir = checkpoint.directory()
    local _ <close> = setmetatable({}, { __close = function() checkpoint.remove(dir) end })
    checkpoint.write(dir .. "/in.safetensors", {
      w = { dtype = "F32", shape = { 40, 128 },
        data = numbers.pack(normal(numbers.rng(12), 40 * 128)) },
      h = { dtype = "F32", shape = { 128, 128 }, data = numbers.pack(case.inputs) },
      ["h.counts"] = { dtype = "I64", shape = { 1 }, data = counts(512) } })
    checkpoint.spit(dir .. "/put.lua", ([[
      local core, dir = require "moonlet.core", %q
      local q = assert(core.quant_open(dir .. "/in.safetensors", 1))
      assert(q:hessians(dir .. "/in.safetensors"))
      assert(q:create(dir .. "/" .. core.kern_selected() .. ".safetensors", {
        { name = "w", dtype = "U32", shape = { 40, 12 } },
        { name = "s", dtype = "BF16", shape = { 40, 2 } },
        { name = "b", dtype = "BF16", shape = { 40, 2 } } }, "mlx"))
      assert(q:put { op = "encode", mode = "affine", bits = 3, group = 64, cols = 128,
        part_rows = 40, entry = 1, fit = "mse", hessian = "h",
        parts = { { name = "w", first_row = 0 } } })
      assert(q:finish())
    ]]):format(dir))
    local files = {}
    for i, variant in ipairs(core.kernels()) do
      local command = ("LUA_CPATH=%q MOONLET_CPU=%s lua5.4 %s/put.lua"):format(package.cpath,
        variant.level, dir)
      assert.is_true(os.execute(command))
      files[i] = checkpoint.slurp(("%s/%s.safetensors"):format(dir, variant.name))
      assert.equal(files[1], files[i])
    end
  end)

  it("gives each expert its own inputs, and the plain fit to one that saw none", function()
    local rng, cols, f = numbers.rng(8), 64, FORMATS.affine4
    local weights = normal(rng, 12 * cols)
    local matrices, all = {}, {}
    for i, r in ipairs { 0.9, 0.5, 0.7 } do
      matrices[i] = numbers.pack(chain(cols, r))
      all[i] = matrices[i]
    end
    local inputs = { data = table.concat(all), shape = { 3, cols, cols },
      counts = counts(500, 0, 700) }
    local got = assert(put(weights, cols, f, inputs))
    local plain = assert(put(weights, cols, f))
    for i, n in ipairs { 500, 0, 700 } do
      local rows = table.move(weights, (i - 1) * 4 * cols + 1, i * 4 * cols, 1, {})
      local one = n == 0 and put(rows, cols, f)
        or put(rows, cols, f, { data = matrices[i], counts = counts(n) })
      local again = put(rows, cols, f, inputs, { expert = i - 1 })
      for _, array in ipairs { "w", "s", "b" } do
        local size = #got[array] // 3
        assert.equal(one[array], got[array]:sub((i - 1) * size + 1, i * size))
        assert.equal(one[array], again[array])
      end
    end
    assert.not_same(plain, got)
  end)

  -- The blocks of H's diagonal, n of them, as bytes.
  local function diagonal(H, cols, n)
    local side, parts = cols // n, {}
    for b = 0, n - 1 do
      for i = 0, side - 1 do
        local at = (b * side + i) * cols + b * side + 1
        parts[#parts + 1] = numbers.pack(table.move(H, at, at + side - 1, 1, {}))
      end
    end
    return table.concat(parts)
  end

  it("encodes each block of columns as if it were a matrix of its own", function()
    for name, f in pairs(FORMATS) do
      local weights, blocks = normal(numbers.rng(12), 40 * 384), { 0.9, 0.5, 0.8 }
      for i, r in ipairs(blocks) do blocks[i] = numbers.pack(chain(128, r)) end
      local got = assert(put(weights, 384, f, { data = table.concat(blocks),
        shape = { 3, 128, 128 }, counts = counts(500, 0, 700) }, { threads = 2 }))
      for b, n in ipairs { 500, 0, 700 } do
        local own = {}
        for row = 0, 39 do
          local at = row * 384 + (b - 1) * 128 + 1
          table.move(weights, at, at + 127, row * 128 + 1, own)
        end
        local one = put(own, 128, f, n > 0 and { data = blocks[b], counts = counts(n) } or nil)
        for array, bytes in pairs(one) do
          local size = #bytes // 40
          for row = 0, 39 do
            local at = (row * 3 + b - 1) * size
            assert.equal(bytes:sub(row * size + 1, (row + 1) * size),
              got[array]:sub(at + 1, at + size), name)
          end
        end
      end
    end
  end)

  it("gains from the blocks of a diagonal alone, if less than from all of it", function()
    local cols, f = 512, FORMATS.affine3
    local H, weights = chain(cols, 0.95), normal(numbers.rng(13), 8 * cols)
    local function cost(with)
      return sum(costs(weights, decode(assert(put(weights, cols, f, with, { fit = "mse" })), 8,
        cols, f), H, 100000, cols))
    end
    local plain, whole = cost(), cost { data = numbers.pack(H), counts = counts(100000) }
    local blocks = cost { data = diagonal(H, cols, 4), shape = { 4, 128, 128 },
      counts = counts(100000, 100000, 100000, 100000) }
    assert.is_true(blocks < 0.8 * plain, ("%g of %g"):format(blocks, plain))
    assert.is_true(whole < blocks)
  end)

  it("divides inputs by the scales of their columns", function()
    local cols, f, weights = 64, FORMATS.affine4, normal(numbers.rng(9), 8 * 64)
    local H, scales, scaled, divided = chain(cols, 0.9), {}, {}, {}
    for i = 1, cols do scales[i] = 2.0 ^ (i % 5 - 2) end
    for i = 1, #weights do scaled[i] = weights[i] * scales[(i - 1) % cols + 1] end
    for i = 1, cols do
      for j = 1, cols do
        local at = (i - 1) * cols + j
        divided[at] = H[at] / (scales[i] * scales[j])
      end
    end
    local function inputs(matrix) return { data = numbers.pack(matrix), counts = counts(1000) } end
    local part = { name = "w", first_row = 0, col_scale = numbers.pack(scales) }
    assert.same(put(scaled, cols, f, inputs(divided)),
      put(weights, cols, f, inputs(H), { parts = { part } }))
    -- parts of different scales do not share
    local other = { name = "w", first_row = 4, col_scale = numbers.pack(scales) }
    local mixed = assert(put(weights, cols, f, inputs(H), { part_rows = 4,
      parts = { { name = "w", first_row = 0 }, other } }))
    local plain, folded = put(weights, cols, f, inputs(H)),
      put(weights, cols, f, inputs(H), { parts = { part } })
    assert.equal(plain.w:sub(1, #plain.w // 2) .. folded.w:sub(#folded.w // 2 + 1), mixed.w)
  end)

  it("survives inputs that never occur, and weights near the end of f32", function()
    local cols, f = 64, FORMATS.affine4
    local H = chain(cols, 0.9)
    for i = 1, cols * cols do
      if (i - 1) % cols >= 32 or (i - 1) // cols >= 32 then H[i] = 0 end
    end
    local weights = normal(numbers.rng(10), 2 * cols)
    for i = 1, cols do weights[i] = weights[i] * 0x1p126 end
    local inputs = { data = numbers.pack(H), counts = counts(3) }
    for _, v in ipairs(decode(assert(put(weights, cols, f, inputs)), 2, cols, f)) do
      assert.equal(v, v)
    end
  end)

  it("says which Hessian is not of these columns, or of nothing", function()
    local weights, f = normal(numbers.rng(11), 6 * 64), FORMATS.affine4
    local function failure(inputs, job)
      local got, message, code = put(weights, 64, f, inputs, job)
      assert.is_nil(got)
      return code .. ": " .. message
    end
    local zeros = ("\0"):rep(4 * 64 * 64)
    assert.matches("^range: .*h.safetensors: tensor inputs is F32 32 x 32; w has rows of 64, "
      .. "which need F32 64 x 64$", failure { data = ("\0"):rep(4096), shape = { 32, 32 },
      counts = counts(1) })
    assert.matches("^range: .*tensor inputs has matrices of 4 experts; w has others$",
      failure { data = zeros:rep(4), shape = { 4, 64, 64 }, counts = counts(1, 1, 1, 1) })
    assert.matches("^range: .*tensor inputs has matrices of 2 experts; w has others$",
      failure({ data = zeros:rep(2), shape = { 2, 64, 64 }, counts = counts(1, 1) },
        { expert = 2 }))
    assert.equal("unsupported", failure({ data = ("\0"):rep(4 * 4 * 16 * 16),
      shape = { 4, 16, 16 }, counts = counts(1, 1, 1, 1) }):match("^(%w+): .*tensor inputs has "
      .. "blocks of 16, which cut groups of w$"))
    assert.matches("^range: .*tensor inputs is F32 2 x 16 x 16; w has rows of 64", failure {
      data = ("\0"):rep(2 * 4 * 16 * 16), shape = { 2, 16, 16 }, counts = counts(1, 1) })
    assert.matches("^range: .*tensor inputs.counts is not I64 %[1%]$",
      failure { data = zeros, counts = counts(1, 1) })
    local dir <close> = checkpoint.scope()
    checkpoint.write(dir.path .. "/h.safetensors", {
      inputs = { dtype = "F32", shape = { 12, 12 }, data = ("\0"):rep(4 * 12 * 12) },
      ["inputs.counts"] = { dtype = "I64", shape = { 1 }, data = counts(1) },
      w = { dtype = "F32", shape = { 2, 12 }, data = ("\0"):rep(4 * 24) } })
    local writer <close> = assert(core.quant_open(dir.path .. "/h.safetensors", 1))
    assert(writer:hessians(dir.path .. "/h.safetensors"))
    assert.same({ nil, "w: error feedback takes rows of a multiple of 8, not of 12",
      "unsupported" }, { writer:try({ op = "encode", mode = "fp8", cols = 12, part_rows = 2,
        hessian = "inputs", parts = { { name = "w", first_row = 0 } } }, 2) })
    for _, bad in ipairs { 0 / 0, -1, math.huge } do
      local H = chain(64, 0.5)
      H[65 * 7 + 1] = bad
      assert.matches("^format: .*tensor inputs, matrix 0: numbers that no inputs give$",
        failure { data = numbers.pack(H), counts = counts(1) })
    end
  end)

  it("goes without a Hessian that no damping saves, expert by expert, and counts them", function()
    local weights, f = normal(numbers.rng(12), 6 * 64), FORMATS.affine4
    local good, bad = chain(64, 0.5), chain(64, 0.5)
    bad[2], bad[65] = 50000, 50000 -- more than the diagonal allows
    local good_data, bad_data = numbers.pack(good), numbers.pack(bad)
    local function inputs(data) return { data = data, shape = { 2, 64, 64 },
      counts = counts(1000, 1000) } end
    local mixed, lost = put(weights, 64, f, inputs(good_data .. bad_data))
    local fed, none = put(weights, 64, f, inputs(good_data:rep(2)))
    local plain = put(weights, 64, f)
    assert.same({ 1, 0 }, { lost, none })
    for name, bytes in pairs(mixed) do
      local half = #bytes // 2
      assert.equal(fed[name]:sub(1, half) .. plain[name]:sub(half + 1), bytes, name)
    end
  end)
end)
