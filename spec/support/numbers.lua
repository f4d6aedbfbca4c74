-- Arrays of numbers as byte strings, and their comparison to the bit.

local numbers = {}

--- f32 little-endian bytes of a Lua array.
function numbers.pack(values)
  local parts = {}
  for i = 1, #values, 100 do
    local last = math.min(i + 99, #values)
    parts[#parts + 1] = string.pack("<" .. ("f"):rep(last - i + 1), table.unpack(values, i, last))
  end
  return table.concat(parts)
end

--- The array behind f32 bytes.
function numbers.unpack(bytes)
  local values = {}
  for i = 1, #bytes // 4 do values[i] = string.unpack("<f", bytes, 4 * i - 3) end
  return values
end

--- A generator of its own, so that specs do not depend on the order in which they run.
-- xorshift64*, Vigna 2016.
function numbers.rng(seed)
  local state = seed * 0x9E3779B97F4A7C15 + 1
  local rng = {}

  --- Uniform in [0, 1).
  function rng.uniform()
    state = state ~ (state >> 12)
    state = state ~ (state << 25)
    state = state ~ (state >> 27)
    return ((state * 0x2545F4914F6CDD1D) >> 11) * 0x1p-53
  end

  --- n numbers in (-scale, scale).
  function rng.floats(n, scale)
    local values = {}
    for i = 1, n do values[i] = (rng.uniform() * 2 - 1) * (scale or 1) end
    return values
  end

  --- n random bytes.
  function rng.bytes(n)
    local parts = {}
    for i = 1, n do parts[i] = string.char(math.floor(rng.uniform() * 256)) end
    return table.concat(parts)
  end

  --- n numbers of which about one in `every` is awkward: zeros, subnormals, infinities, NaN, huge.
  function rng.awkward(n, every)
    local odd = { 0.0, -0.0, 0x1p-149, -0x1p-149, 0x1p-127, 3.0e38, -3.0e38, 1 / 0, -1 / 0, 0 / 0,
      88.7, -87.3, 88.73, -87.4, 104, -104, 65504, 65520, 0x1p-24, 0x1p-25, -0x1.8p-25 }
    local values = rng.floats(n, 8)
    for i = 1, n do
      if rng.uniform() * (every or 4) < 1 then
        values[i] = odd[1 + math.floor(rng.uniform() * #odd)]
      end
    end
    return values
  end

  return rng
end

local function is_nan(bits)
  return bits & 0x7f800000 == 0x7f800000 and bits & 0x007fffff ~= 0
end

--- nil if both f32 strings are the same bits, else where they first differ. Any NaN equals any
-- other: which payload survives an operation is up to the compiler.
function numbers.difference(a, b)
  if a == b then return nil end
  if #a ~= #b then return ("%d bytes, expected %d"):format(#b, #a) end
  for i = 1, #a // 4 do
    local x, y = string.unpack("<I4", a, 4 * i - 3), string.unpack("<I4", b, 4 * i - 3)
    if x ~= y and not (is_nan(x) and is_nan(y)) then
      return ("element %d is %08x (%g), expected %08x (%g)"):format(
        i - 1, y, string.unpack("<f", b, 4 * i - 3), x, string.unpack("<f", a, 4 * i - 3))
    end
  end
  return nil
end

--- n lengths around the width of a register, or any others that matter.
numbers.lengths = { 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 100, 128, 129, 257 }

return numbers
