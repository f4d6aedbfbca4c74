--- Imatrix files in GGUF as plain Lua tables, read without the engine.
local gguf = {}

local SIZES = { [0] = 1, 1, 2, 2, 4, 4, 4, 1, [10] = 8, [11] = 8, [12] = 8 }

-- The position behind a value of this kind.
local function skip(bytes, kind, at)
  if kind == 8 then return select(2, string.unpack("<s8", bytes, at)) end
  if kind ~= 9 then return at + SIZES[kind] end
  local n
  kind, n, at = string.unpack("<I4I8", bytes, at)
  for _ = 1, n do at = skip(bytes, kind, at) end
  return at
end

---@return table name of the weight -> { in_sum2 = bytes, counts = bytes, in_sum = bytes?, dims }
function gguf.read(path)
  local f <close> = assert(io.open(path, "rb"))
  local bytes = f:read("a")
  local magic, version, n_tensors, n_values, at = string.unpack("<c4I4I8I8", bytes)
  assert(magic == "GGUF" and version == 3)
  for _ = 1, n_values do
    local kind
    _, kind, at = string.unpack("<s8I4", bytes, at)
    at = skip(bytes, kind, at)
  end
  local tensors = {}
  for i = 1, n_tensors do
    local t, n_dims = { dims = {} }
    t.name, n_dims, at = string.unpack("<s8I4", bytes, at)
    for d = 1, n_dims do t.dims[d], at = string.unpack("<I8", bytes, at) end
    t.kind, t.offset, at = string.unpack("<I4I8", bytes, at)
    assert(t.kind == 0)
    tensors[i] = t
  end
  local base, entries = (at - 1 + 31) // 32 * 32, {}
  for _, t in ipairs(tensors) do
    local size = 4
    for _, d in ipairs(t.dims) do size = size * d end
    local weight, part = t.name:match("^(.*)%.([%w_]+)$")
    local entry = entries[weight] or {}
    entries[weight] = entry
    entry[part] = bytes:sub(base + t.offset + 1, base + t.offset + size)
    if part == "in_sum2" then entry.dims = t.dims end
  end
  return entries
end

return gguf
