-- Every variant decodes and multiplies every storage mode to the bits of the definition.

local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local ELEMENT = { f32 = 4, f16 = 2, bf16 = 2 }

--- Small positive and negative scales, with an awkward one now and then.
local function elements(rng, n, dtype)
  local parts = {}
  for i = 1, n do
    local v = (rng.uniform() * 2 - 1) * 0.1
    if rng.uniform() < 0.03 then v = rng.awkward(1, 1)[1] end
    local f32 = string.pack("<f", v)
    if dtype == "f32" then
      parts[i] = f32
    elseif dtype == "bf16" then
      parts[i] = f32:sub(3)
    else
      parts[i] = core.kern_run("scalar", "f16_encode", { x = f32 })
    end
  end
  return table.concat(parts)
end

--- A matrix of random codes in the form that core.kern_run takes.
local function matrix(rng, shape)
  local m = {}
  for k, v in pairs(shape) do m[k] = v end
  local size = ELEMENT[m.mode]
  if size then
    m.codes = elements(rng, m.rows * m.cols, m.mode)
    return m
  end
  local bits = m.bits or (m.mode == "mxfp4" or m.mode == "nvfp4") and 4 or 8
  m.codes = rng.bytes(m.rows * ((m.cols * bits + 7) // 8))
  local n = (m.rows + (m.tile_rows or 1) - 1) // (m.tile_rows or 1) *
    ((m.cols + m.group - 1) // m.group)
  if m.scale_dtype then
    m.scales = elements(rng, n, m.scale_dtype)
  else
    m.scales = rng.bytes(n)
  end
  if m.bias_dtype then m.biases = elements(rng, n, m.bias_dtype) end
  return m
end

local function describe_matrix(m)
  return ("%s %s bits, %d x %d, group %s, scales %s"):format(m.mode, m.bits or "usual", m.rows,
    m.cols, m.group or "none", m.scale_dtype or "usual")
end

local function check(rng, shape)
  local m = matrix(rng, shape)
  local what = describe_matrix(m)
  local expected = core.decode_rows(m)
  local x = numbers.pack(rng.floats(m.cols))
  local product = core.kern_run("scalar", "linear", { matrix = m, x = x, n_x = 1 })
  for _, variant in ipairs(core.kernels()) do
    local decoded = core.kern_run(variant.name, "decode", { matrix = m })
    local wrong = numbers.difference(expected, decoded)
    if wrong then error(("%s: decode of %s: %s"):format(variant.name, what, wrong), 2) end
    local y = core.kern_run(variant.name, "linear", { matrix = m, x = x, n_x = 1 })
    wrong = numbers.difference(product, y)
    if wrong then error(("%s: product of %s: %s"):format(variant.name, what, wrong), 2) end
  end
end

describe("decoding agrees with the definition for", function()
  for _, mode in ipairs { "f32", "f16", "bf16" } do
    it(mode, function()
      local rng = numbers.rng(1)
      for _, cols in ipairs(numbers.lengths) do
        check(rng, { mode = mode, rows = 5, cols = cols })
      end
    end)
  end

  for bits = 1, 8 do
    it(("affine with %d bits"):format(bits), function()
      local rng = numbers.rng(bits)
      for _, scale_dtype in ipairs { "bf16", "f16", "f32" } do
        for _, bias_dtype in ipairs { scale_dtype, "f32" } do
          for _, group in ipairs { 16, 32, 64, 128 } do
            for _, n_groups in ipairs { 1, 3, 16, 17 } do
              check(rng, { mode = "affine", bits = bits, group = group, rows = 5,
                cols = group * n_groups, scale_dtype = scale_dtype, bias_dtype = bias_dtype })
            end
          end
        end
      end
      for _, cols in ipairs(numbers.lengths) do -- one group per row, and groups that end anywhere
        check(rng, { mode = "affine", bits = bits, group = cols, rows = 6, cols = cols,
          scale_dtype = "bf16", bias_dtype = "bf16" })
        check(rng, { mode = "affine", bits = bits, group = cols, rows = 6, cols = cols * 3,
          scale_dtype = "bf16", bias_dtype = "bf16" })
      end
    end)
  end

  for mode, group in pairs { mxfp4 = 32, mxfp8 = 32, nvfp4 = 16 } do
    it(mode, function()
      local rng = numbers.rng(group)
      for _, n_groups in ipairs { 1, 2, 5, 15, 16, 17, 33 } do
        for rows = 1, 9 do
          check(rng, { mode = mode, group = group, rows = rows, cols = group * n_groups,
            divisor = mode == "nvfp4" and 1234.5 or nil })
        end
      end
    end)
  end

  it("fp8 in tiles that the edges cut", function()
    local rng = numbers.rng(3)
    for _, cols in ipairs { 16, 40, 128, 200, 257, 384 } do
      for _, group in ipairs { 16, 128, cols } do
        for _, tile_rows in ipairs { 1, 3, 128 } do
          for _, dtype in ipairs { "bf16", "f32", "f16" } do
            check(rng, { mode = "fp8", bits = 8, group = group, tile_rows = tile_rows, rows = 7,
              cols = cols,
              scale_dtype = dtype })
          end
        end
      end
    end
  end)

  it("every E4M3 code and every E8M0 scale", function()
    local codes, scales = {}, {}
    for i = 0, 255 do
      codes[i + 1], scales[i + 1] = string.char(i), string.char(i)
    end
    codes, scales = table.concat(codes), table.concat(scales)
    local rng = numbers.rng(5)
    for row = 0, 31 do
      local m = { mode = "mxfp8", group = 32, rows = 32, cols = 256, codes = codes:rep(32),
        scales = (scales:sub(row * 8 + 1) .. scales:sub(1, row * 8)) }
      local expected = core.decode_rows(m)
      for _, variant in ipairs(core.kernels()) do
        local got = core.kern_run(variant.name, "decode", { matrix = m })
        assert.is_nil(numbers.difference(expected, got))
      end
    end
    local m = { mode = "nvfp4", group = 16, rows = 16, cols = 256, codes = rng.bytes(2048),
      scales = codes, divisor = 3 }
    local expected = core.decode_rows(m)
    for _, variant in ipairs(core.kernels()) do
      local got = core.kern_run(variant.name, "decode", { matrix = m })
      assert.is_nil(numbers.difference(expected, got))
    end
  end)
end)
