-- Every byte that MLX's quantizer makes of spec/golden/num/quantize.safetensors, and every number
-- it decodes. The README beside that file says what the rows are.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local oracle = require "spec.support.oracle"

local GOLDEN = "spec/golden/num"
local ELEMENT_BYTES = { U32 = 4, U8 = 1, F32 = 4, BF16 = 2 }

-- "metal-old", "affine.b4.g64.bf16" -> options of quantize_tensor, less rows and cols
local function options(flavour, case)
  local bits, group = case:match "^affine%.b(%d)%.g(%d+)"
  return {
    mode = case:find "^nvfp4" and "nvfp4" or case:match "^[^.]+",
    bits = math.tointeger(bits),
    group = math.tointeger(group),
    dtype = case:match "[^.]+$",
    flavour = flavour:match "^%a+",
    mx_rule = flavour:find "old" and "nearest" or "ceil",
  }
end

-- MLX on a CPU lets the scale byte of a group of denormals wrap (left half of row 8); up to
-- 0.32.1 it also computed the scales of bf16 weights in bf16, which shows in rows 0 and 11.
local function known_deviation(flavour, case, row, at, bytes_per_row)
  if not flavour:find "^cpu" or not case:find "^mxfp" then return false end
  if row == 8 and at < bytes_per_row / 2 then return true end
  return flavour == "cpu-old" and case:find "bf16$" and (row == 0 or row == 11)
end

local function compare(flavour, case, part, want, got)
  assert.equal(#want.data, #got, part)
  local step, per_row = ELEMENT_BYTES[want.dtype], #got // want.shape[1]
  for at = 1, #got, step do
    local row, in_row = (at - 1) // per_row, (at - 1) % per_row
    if got:sub(at, at + step - 1) ~= want.data:sub(at, at + step - 1)
      and not known_deviation(flavour, case, row, in_row, per_row) then
      error(("%s.%s.%s: row %d differs at byte %d"):format(flavour, case, part, row, in_row))
    end
  end
end

local function bf16(u)
  return (string.unpack("<f", string.pack("<I4", u << 16)))
end

-- MLX rounds product and sum to bf16 there, moonlet only the sum: within one bf16 ulp of the bias.
local function compare_bf16_affine(case, group, biases, want, got)
  for i = 0, #got // 2 - 1 do
    local a, b = string.unpack("<I2", got, 2 * i + 1), string.unpack("<I2", want, 2 * i + 1)
    if a ~= b then
      local bias = bf16(string.unpack("<I2", biases, 2 * (i // group) + 1))
      local ulp = 2.0 ^ (math.floor(math.log(math.abs(bias), 2)) - 7)
      if math.abs(bf16(a) - bf16(b)) > ulp then
        error(("%s: element %d is %g, not %g"):format(case, i, bf16(a), bf16(b)))
      end
    end
  end
end

local function each_case(tensors, visit)
  local names = {}
  for name in pairs(tensors) do
    if name:find "%.weight$" then names[#names + 1] = name end
  end
  table.sort(names)
  for _, name in ipairs(names) do visit(name:match "^([%w-]+)%.(.+)%.weight$") end
  return #names
end

local function check_encoding(tensors, flavour, case)
  local function golden(part, of) return tensors[(of or flavour) .. "." .. case .. "." .. part] end
  local o = options(flavour, case)
  local input = tensors["in." .. o.dtype]
  o.rows, o.cols = input.shape[1], input.shape[2]
  local gs = golden("global_scale", "cpu")
  o.global_scale = gs and string.unpack("<f", gs.data) or nil
  local parts = assert(core.quantize_tensor(input.data, o))
  for _, part in ipairs { "weight", "scales", "biases" } do
    local want = golden(part)
    assert.equal(want ~= nil, parts[part] ~= nil, part)
    if want then compare(flavour, case, part, want, parts[part]) end
  end
end

-- False when the file has no decoded values of that flavour: the Metal ones are computed codes.
local function check_decoding(tensors, flavour, case)
  local function golden(part) return tensors[flavour .. "." .. case .. "." .. part] end
  local o, want = options(flavour, case), golden "dequant"
  if not want then return false end
  local gs, biases = golden "global_scale", golden "biases"
  local got = assert(core.dequantize_tensor(
    { weight = golden("weight").data, scales = golden("scales").data,
      biases = biases and biases.data },
    { rows = want.shape[1], cols = want.shape[2], mode = o.mode, bits = o.bits, group = o.group,
      dtype = want.dtype:lower(), global_scale = gs and string.unpack("<f", gs.data) or nil }))
  if o.mode == "affine" and o.dtype == "bf16" then
    compare_bf16_affine(case, o.group, biases.data, want.data, got)
  else
    compare("metal", case, "dequant", want, got)
  end
  return true
end

describe("the MLX golden file", function()
  local tensors = checkpoint.read(GOLDEN .. "/quantize.safetensors")

  it("has every case", function()
    local seen = {}
    -- 21 affine formats, 3 small floats and nvfp4 with a tensor scale, each of f32 and bf16
    assert.equal(2 * 50 + 2 * 4, each_case(tensors, function(flavour)
      seen[flavour] = (seen[flavour] or 0) + 1
    end))
    assert.same({ cpu = 50, metal = 50, ["cpu-old"] = 4, ["metal-old"] = 4 }, seen)
  end)

  each_case(tensors, function(flavour, case)
    it("is reproduced: " .. flavour .. " " .. case, function()
      check_encoding(tensors, flavour, case)
    end)
  end)

  it("is decoded to the same numbers", function()
    local n = 0
    each_case(tensors, function(flavour, case)
      if check_decoding(tensors, flavour, case) then n = n + 1 end
    end)
    assert.equal(54, n)
  end)

  it("keeps denormal groups small where MLX on a CPU lets the scale byte wrap", function()
    for _, mode in ipairs { "mxfp4", "mxfp8" } do
      local half = tensors["in.f32"].data:sub(8 * 1024 + 1, 8 * 1024 + 512)
      local o = { rows = 1, cols = 128, mode = mode, flavour = "cpu" }
      local parts = assert(core.quantize_tensor(half, o))
      assert.equal(("\0"):rep(4), parts.scales)
      local decoded = assert(core.dequantize_tensor(parts, { rows = 1, cols = 128, mode = mode }))
      for i = 0, 127 do
        local w, d = string.unpack("<f", half, 4 * i + 1), string.unpack("<f", decoded, 4 * i + 1)
        assert.is_true(math.abs(w - d) <= 2.0 ^ -127 / 4)
      end
    end
  end)
end)

describe("MLX itself #oracle", function()
  it("agrees on inputs of another seed", function()
    local path, python = os.tmpname(), oracle.python()
    local command = "%s %s/make.py --out %s --seed 7 --cols 512 >/dev/null"
    assert(os.execute(command:format(python, GOLDEN, path)))
    local tensors = checkpoint.read(path)
    os.remove(path)
    each_case(tensors, function(flavour, case)
      check_encoding(tensors, flavour, case)
      check_decoding(tensors, flavour, case)
    end)
  end)
end)
