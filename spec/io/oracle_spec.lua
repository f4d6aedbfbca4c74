local json = require "moonlet.json"
local oracle = require "spec.support.oracle"
local safetensors = require "moonlet.safetensors"

local function write(path, bytes)
  local file = assert(io.open(path, "wb"))
  file:write(bytes)
  file:close()
end

local function ask(command, path)
  local script = oracle.python() .. " spec/golden/io/oracle.py"
  local pipe = assert(io.popen(("%s %s %s"):format(script, command, path)))
  local lines = {}
  for line in pipe:lines() do
    lines[#lines + 1] = line
  end
  assert(pipe:close())
  return lines
end

local function image(header, data)
  return string.pack("<I8", #header) .. header .. data
end

-- Every bit flip, some telling bytes and every cut of the image's header.
local function damaged(bytes)
  local images = {}
  local header_end = 8 + string.unpack("<I8", bytes)
  for i = 1, header_end do
    local function replace(byte)
      images[#images + 1] = bytes:sub(1, i - 1) .. string.char(byte) .. bytes:sub(i + 1)
    end
    for bit = 0, 7 do
      replace(bytes:byte(i) ~ (1 << bit))
    end
    for _, byte in ipairs { 0x20, 0x22, 0x2c, 0x2d, 0x2e, 0x30, 0x31, 0x39, 0x5d, 0x7d } do
      replace(byte)
    end
    images[#images + 1] = bytes:sub(1, i - 1)
    if i > 8 then
      images[#images + 1] = string.pack("<I8", header_end - 9) .. bytes:sub(9, i - 1)
        .. bytes:sub(i + 1)
    end
  end
  return images
end

describe("the reference programs #oracle", function()
  local path
  before_each(function()
    path = os.tmpname()
  end)
  after_each(function()
    os.remove(path)
  end)

  it("Python spells floats the same", function()
    local numbers, state = {}, 7
    for exponent = 0, 2046 do
      numbers[#numbers + 1] = string.unpack("<d", string.pack("<i8", exponent << 52))
      numbers[#numbers + 1] = string.unpack("<d", string.pack("<i8", (exponent << 52) | 1))
    end
    for i = 1, 50000 do
      state = state * 6364136223846793005 + 1442695040888963407
      local x = string.unpack("<d", string.pack("<i8", state))
      if x - x == 0 then
        numbers[#numbers + 1] = x
      end
      numbers[#numbers + 1] = i / 1000
      numbers[#numbers + 1] = (string.unpack("<f", string.pack("<f", (state >> 40) / 7.0)))
    end
    local packed = {}
    for i, x in ipairs(numbers) do
      packed[i] = string.pack("<d", x)
    end
    write(path, table.concat(packed))
    local spelled = ask("dumps", path)
    assert.equal(#numbers, #spelled)
    for i, x in ipairs(numbers) do
      assert.equal(spelled[i], json.encode(x))
    end
  end)

  it("safetensors takes and refuses the same files", function()
    local images = damaged(image('{"__metadata__":{"a":"b"},'
      .. '"x":{"dtype":"F16","shape":[2,3],"data_offsets":[3,15]},'
      .. '"y":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', "abcdefghijklmno"))
    local packed = {}
    for i, bytes in ipairs(images) do
      packed[i] = string.pack("<s4", bytes)
    end
    write(path, table.concat(packed))
    local verdicts = ask("verdicts", path)
    assert.equal(#images, #verdicts)
    for i, bytes in ipairs(images) do
      write(path, bytes)
      local set, message = safetensors.open(path)
      -- An empty name is the one thing that only moonlet refuses.
      if set or not message:find("tensor name is empty", 1, true) then
        assert.equal(verdicts[i], set and "1" or "0", ("%q: %s"):format(bytes, message))
      end
      if set then
        set:close()
      end
    end
  end)

  it("safetensors reads what moonlet writes", function()
    assert(safetensors.write(path, {
      { name = "w", dtype = "BF16", shape = { 2, 3 }, data = "abcdefghijkl" },
      { name = "a.\u{e9}", dtype = "U8", shape = { 1 }, data = "\xff" },
      { name = "none", dtype = "F32", shape = { 0, 7 }, data = "" },
      { name = "s", dtype = "I64", shape = {}, data = "01234567" },
    }, { format = "mlx" }))
    assert.same({
      "a.\u{e9} U8 1 ff",
      "none F32 0 7 ",
      "s I64 3031323334353637",
      "w BF16 2 3 6162636465666768696a6b6c",
    }, ask("tensors", path))
  end)
end)
