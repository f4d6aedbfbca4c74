--- Safetensors files as plain Lua tables, read and written without the engine: specs break golden
-- checkpoints with it and look at values that the engine decodes.
local checkpoint = {}

local function slurp(path)
  local f = assert(io.open(path, "rb"))
  local bytes = f:read("a")
  f:close()
  return bytes
end
checkpoint.slurp = slurp

local function spit(path, bytes)
  local f = assert(io.open(path, "wb"))
  assert(f:write(bytes))
  f:close()
end
checkpoint.spit = spit

---@return table name -> { dtype = "BF16", shape = {...}, data = bytes }
function checkpoint.read(path)
  local bytes = slurp(path)
  local size = string.unpack("<I8", bytes)
  local header, tensors = bytes:sub(10, 7 + size):gsub("%s", ""), {}
  for name, entry in header:gmatch('"([^"]+)":(%b{})') do
    local from, to = entry:match('"data_offsets":%[(%d+),(%d+)%]')
    local shape = {}
    for d in (entry:match('"shape":%[([%d,]*)%]') or ""):gmatch("%d+") do
      shape[#shape + 1] = math.tointeger(d)
    end
    if from then
      tensors[name] = { dtype = entry:match('"dtype":"([^"]+)"'), shape = shape,
        data = bytes:sub(9 + size + from, 8 + size + to) }
    end
  end
  return tensors
end

---Writes all tensors to one file.
function checkpoint.write(path, tensors, metadata)
  local names, parts, data, at = {}, {}, {}, 0
  for name in pairs(tensors) do names[#names + 1] = name end
  table.sort(names)
  if metadata then parts[1] = '"__metadata__":{"format":"' .. metadata .. '"}' end
  for _, name in ipairs(names) do
    local t = tensors[name]
    parts[#parts + 1] = ('"%s":{"dtype":"%s","shape":[%s],"data_offsets":[%d,%d]}'):format(
      name, t.dtype, table.concat(t.shape, ","), at, at + #t.data)
    data[#data + 1] = t.data
    at = at + #t.data
  end
  local header = "{" .. table.concat(parts, ",") .. "}"
  spit(path, string.pack("<I8", #header) .. header .. table.concat(data))
end

---A new empty directory; remove it with checkpoint.remove.
function checkpoint.directory()
  local path = os.tmpname()
  os.remove(path)
  assert(os.execute("mkdir " .. path))
  return path
end

function checkpoint.remove(dir)
  assert(dir:match("^/tmp/"))
  os.execute("rm -r " .. dir)
end

---A new empty directory at `.path` that goes with the variable: local dir <close> = ...
function checkpoint.scope()
  return setmetatable({ path = checkpoint.directory() },
    { __close = function(self) checkpoint.remove(self.path) end })
end

local function copy(t)
  local c = {}
  for k, v in pairs(t) do c[k] = type(v) == "table" and copy(v) or v end
  return c
end

local loaded = {}

---Tensors of all files of a golden checkpoint directory, for the caller to change.
function checkpoint.load(dir)
  if loaded[dir] then return copy(loaded[dir]) end
  local all = {}
  local ls = assert(io.popen("ls " .. dir .. "/*.safetensors"))
  for path in ls:lines() do
    for name, t in pairs(checkpoint.read(path)) do all[name] = t end
  end
  ls:close()
  loaded[dir] = all
  return copy(all)
end

---Writes a changed copy of the checkpoint at `dir` as one file; the caller removes it.
---@param edit fun(tensors: table, config: string): string? may return another config.json
function checkpoint.edited(dir, edit)
  local tensors, config = checkpoint.load(dir), slurp(dir .. "/config.json")
  local out = checkpoint.directory()
  spit(out .. "/config.json", edit(tensors, config) or config)
  checkpoint.write(out .. "/model.safetensors", tensors)
  return out
end

---@return number[] elements of a tensor of any dtype below
function checkpoint.values(t)
  local values, data = {}, t.data
  if t.dtype == "BF16" then
    return checkpoint.floats(checkpoint.widen(data))
  else
    local format = ({ F32 = "<f", I32 = "<i4", U8 = "B" })[t.dtype]
    local size = string.packsize(format)
    for i = 1, #data // size do values[i] = string.unpack(format, data, (i - 1) * size + 1) end
  end
  return values
end

---@return number[] of little-endian f32 bytes
function checkpoint.floats(bytes)
  return checkpoint.values { dtype = "F32", data = bytes }
end

---bf16 bytes widened to f32 bytes.
function checkpoint.widen(bytes)
  return (bytes:gsub("..", "\0\0%0"))
end

---f32 bytes rounded to bf16, ties to even, as bf16 bytes.
function checkpoint.to_bf16(bytes)
  local out = {}
  for i = 1, #bytes, 4 do
    local u = string.unpack("<I4", bytes, i)
    out[#out + 1] = string.pack("<I2", (u + 0x7fff + (u >> 16 & 1)) >> 16 & 0xffff)
  end
  return table.concat(out)
end

return checkpoint
