--- Golden safetensors as Lua arrays, and comparisons with them.
local safetensors = require "moonlet.safetensors"

local golden = {}

local readers = { F32 = { "<f", 4 }, I32 = { "<i4", 4 }, I64 = { "<i8", 8 } }

---@return number[] values of little-endian bytes
function golden.unpack(bytes, dtype)
  local format, size = table.unpack(readers[dtype])
  local values = {}
  for i = 1, #bytes // size do
    values[i] = string.unpack(format, bytes, (i - 1) * size + 1)
  end
  return values
end

---Every tensor of a file: name -> flat array, row major, and its shape under "name:shape".
function golden.open(path)
  local file <close> = assert(safetensors.open(path))
  local all = {}
  for _, name in ipairs(file:names()) do
    local info = file:info(name)
    all[name] = golden.unpack(file:read(name), info.dtype)
    all[name .. ":shape"] = info.shape
  end
  return all
end

---Every tensor of a file: name -> { values =, shape = }.
function golden.read_any(path)
  local file <close> = assert(safetensors.open(path))
  local all = {}
  for _, name in ipairs(file:names()) do
    local info = file:info(name)
    all[name] = { values = golden.unpack(file:read(name), info.dtype), shape = info.shape }
  end
  return all
end

---@return number[] values of a moonlet.tensor of f32
function golden.floats(tensor)
  return golden.unpack(tensor:bytes(), "F32")
end

---@return integer[] values of a moonlet.tensor of int32
function golden.ints(tensor)
  return golden.unpack(tensor:bytes(), "I32")
end

---Largest |got[first + i] - want[i]|; NaN counts as infinite.
function golden.distance(got, want, first)
  first = first or 0
  local worst = 0
  for i = 1, #want do
    local d = math.abs((got[first + i] or 0 / 0) - want[i])
    worst = d ~= d and math.huge or math.max(worst, d)
  end
  return worst
end

---Root mean square.
function golden.rms(values)
  local sum = 0
  for _, v in ipairs(values) do sum = sum + v * v end
  return math.sqrt(sum / #values)
end

---values[first+1 .. first+n]
function golden.slice(values, first, n)
  return table.move(values, first + 1, first + n, 1, {})
end

return golden
