local json = require "moonlet.json"
local safetensors = require "moonlet.safetensors"

local dir

local function path_of(name)
  return dir .. "/" .. name
end

local function write(name, bytes)
  local file = assert(io.open(path_of(name), "wb"))
  file:write(bytes)
  file:close()
  return path_of(name)
end

-- A file with this header text and data, whatever they say.
local function image(header, data)
  return string.pack("<I8", #header) .. header .. (data or "")
end

-- A file with U8 tensors of these names, each holding its own name.
local function shard(...)
  local parts, data = {}, ""
  for _, name in ipairs { ... } do
    parts[#parts + 1] = ('"%s":{"dtype":"U8","shape":[%d],"data_offsets":[%d,%d]}'):format(
      name, #name, #data, #data + #name)
    data = data .. name
  end
  return image("{" .. table.concat(parts, ",") .. "}", data)
end

local function index(map)
  local parts = {}
  for name, file in pairs(map) do
    parts[#parts + 1] = ('"%s": "%s"'):format(name, file)
  end
  return '{"metadata": {"total_size": 1}, "weight_map": {' .. table.concat(parts, ", ") .. "}}"
end

local function names(path)
  local set <close> = assert(safetensors.open(path))
  return table.concat(set:names(), " ")
end

local function refused(path, expected, expected_code)
  local set, message, code = safetensors.open(path)
  assert.is_nil(set)
  assert.equal(expected:gsub("DIR", dir), message)
  assert.equal(expected_code or "format", code)
end

before_each(function()
  dir = os.tmpname()
  os.remove(dir)
  assert(os.execute("mkdir " .. dir))
end)

after_each(function()
  os.execute("rm -r " .. dir)
end)

describe("a safetensors file", function()
  it("gives names, facts, bytes and metadata", function()
    local path = write("f.safetensors", image(
      '{"__metadata__":{"format":"pt","n":"2"},'
        .. '"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},'
        .. '"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        .. '"none":{"dtype":"I64","shape":[4,0],"data_offsets":[16,16]}}   ',
      "\1\2\3\4abcdefghijkl"))
    local set <close> = assert(safetensors.open(path))
    assert.same({ "a", "none", "w" }, set:names())
    local info = set:info("w")
    assert.same({ "BF16", { 2, 3 }, 12, path }, { info.dtype, info.shape, info.bytes, info.file })
    assert.same({}, set:info("a").shape)
    assert.equal(0, set:info("none").bytes)
    assert.is_nil(set:info("x"))
    assert.equal("abcdefghijkl", set:read("w"))
    assert.equal("cdef", set:read("w", 2, 4))
    assert.equal("kl", set:read("w", 10))
    assert.equal("", set:read("w", 12))
    assert.equal("", set:read("none"))
    assert.equal("pt", set:metadata("format"))
    assert.equal("2", set:metadata("n"))
    assert.is_nil(set:metadata("x"))
    local file <close> = assert(io.open(path, "rb"))
    file:seek("set", info.offset)
    assert.equal("abcdefghijkl", file:read(12))
  end)

  it("takes the null that mx.save_safetensors writes in the place of metadata", function()
    local set <close> = assert(safetensors.open(write("n.safetensors", image(
      '{"__metadata__":null,"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "x"))))
    assert.same({ "t" }, set:names())
    assert.is_nil(set:metadata("format"))
  end)

  it("knows every dtype", function()
    local bytes = {
      BOOL = 1, U8 = 1, I8 = 1, F8_E4M3 = 1, F8_E5M2 = 1, F8_E8M0 = 1, U16 = 2, I16 = 2, F16 = 2,
      BF16 = 2, U32 = 4, I32 = 4, F32 = 4, U64 = 8, I64 = 8, F64 = 8,
    }
    for dtype, n in pairs(bytes) do
      local set <close> = assert(safetensors.open(write("d.safetensors", image(
        ('{"t":{"dtype":"%s","shape":[3],"data_offsets":[0,%d]}}'):format(dtype, 3 * n),
        ("x"):rep(3 * n)))))
      assert.equal(3 * n, set:info("t").bytes)
      assert.equal(dtype, set:info("t").dtype)
    end
  end)

  it("raises on misuse", function()
    local set = assert(safetensors.open(write("f.safetensors", shard("abc"))))
    assert.has_error(function() set:read("x") end, "no tensor x")
    assert.has_error(function() set:read("abc", 4) end)
    assert.has_error(function() set:read("abc", -1) end)
    assert.has_error(function() set:read("abc", 1, 3) end)
    set:close()
    set:close()
    assert.has_error(function() set:names() end, "safetensors set is closed")
    assert.has_error(function() set:read("abc") end, "safetensors set is closed")
    assert.has_error(function() set:metadata("abc") end, "safetensors set is closed")
  end)

  it("is refused with the reason", function()
    local function tensor(fields)
      return '{"t":{' .. fields .. "}}"
    end
    local cases = {
      { "", "0 bytes are too few for a safetensors file" },
      { "\1\0\0\0\0\0\0", "7 bytes are too few for a safetensors file" },
      { string.pack("<I8", 100000001) .. "{}",
        "header length 100000001 is above the limit of 100000000 bytes (no safetensors file?)" },
      { ("\xff"):rep(8) .. "{}",
        "header length 18446744073709551615 is above the limit of 100000000 bytes "
          .. "(no safetensors file?)" },
      { string.pack("<I8", 3) .. "{}", "header of 3 bytes in a file of 10 (truncated?)" },
      { string.pack("<I8", 0) .. "{}", "header does not begin with '{'" },
      { image(" {}"), "header does not begin with '{'" },
      { image("{]"), "header: byte 1: key in double quotes expected" },
      { image("{}", "x"), "1 bytes at the end belong to no tensor" },
      { image('{"t":3}'), "tensor t: not described by an object" },
      { image('{"__metadata__":[]}'), "__metadata__ is not an object" },
      { image('{"__metadata__":{"a":1}}'), "__metadata__ has a value that is no string" },
      { image('{"":{}}'), "tensor name is empty or has control characters" },
      { image('{"a\\nb":{}}'), "tensor name is empty or has control characters" },
      { image(tensor('"shape":[1],"data_offsets":[0,1]'), "x"),
        "tensor t: dtype is not a string" },
      { image(tensor('"dtype":"U8","data_offsets":[0,1]'), "x"),
        "tensor t: shape is not an array" },
      { image(tensor('"dtype":"U8","shape":[1]'), "x"),
        "tensor t: data_offsets is not a pair of ascending offsets" },
      { image(tensor('"dtype":"U8","shape":[1],"data_offsets":[0,1,2]'), "x"),
        "tensor t: data_offsets is not a pair of ascending offsets" },
      { image(tensor('"dtype":"U8","shape":[1],"data_offsets":[1,0]'), "x"),
        "tensor t: data_offsets is not a pair of ascending offsets" },
      { image(tensor('"dtype":"U8","shape":[1],"data_offsets":[-1,0]'), "x"),
        "tensor t: data_offsets is not a pair of ascending offsets" },
      { image(tensor('"dtype":"U8","shape":[1.0],"data_offsets":[0,1]'), "x"),
        "tensor t: dimension 0 of shape is not a size" },
      { image(tensor('"dtype":"U8","shape":[1,-1],"data_offsets":[0,1]'), "x"),
        "tensor t: dimension 1 of shape is not a size" },
      { image(tensor('"dtype":"U8","shape":[18446744073709551617],"data_offsets":[0,1]'), "x"),
        "tensor t: dimension 0 of shape is not a size" },
      { image(tensor('"dtype":"U8","shape":[4294967296,4294967297],"data_offsets":[0,0]')),
        "tensor t: shape has more than 2^63 bytes" },
      { image(tensor('"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]')),
        "tensor t: shape has more than 2^63 bytes" },
      { image(tensor('"dtype":"F32","shape":[2],"data_offsets":[0,4]'), "xxxx"),
        "tensor t: data_offsets span 4 bytes, shape and dtype 8" },
      { image('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        .. '"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', "xxx"),
        "tensor b: data overlaps that of a" },
      { image('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        .. '"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', "xx"),
        "tensor b: data overlaps that of a", "tensor a: data overlaps that of b" },
      { image('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        .. '"b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}', "xxxxx"),
        "tensor b: 2 bytes before it belong to no tensor" },
      { image('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        .. '"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},'
        .. '"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "xx"),
        "tensor a is listed twice" },
    }
    for _, case in ipairs(cases) do
      local path = write("bad.safetensors", case[1])
      local set, message, code = safetensors.open(path)
      assert.is_nil(set, case[2])
      local text = message:sub(#path + 3)
      assert.equal(path .. ": ", message:sub(1, #path + 2))
      assert.equal(text == case[3] and case[3] or case[2], text)
      assert.equal("format", code)
    end
    refused(write("n.safetensors", image(tensor('"dtype":"F4","shape":[2],"data_offsets":[0,1]'),
      "x")), 'DIR/n.safetensors: tensor t: unknown dtype "F4"', "unsupported")
    refused(write("n.safetensors", image(tensor('"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],'
      .. '"data_offsets":[0,1]'), "x")),
      "DIR/n.safetensors: tensor t: 9 dimensions, more than 8", "unsupported")
    refused(write("n.safetensors", shard(("n"):rep(256))), "DIR/n.safetensors: tensor name "
      .. ("n"):rep(40) .. "... is longer than 255 bytes", "limit")
    refused(path_of("missing.safetensors"),
      "DIR/missing.safetensors: No such file or directory", "io")
  end)

  it("is refused wherever it is cut", function()
    local bytes = shard("model.a", "model.b")
    for n = 0, #bytes - 1 do
      local set, message, code = safetensors.open(write("cut.safetensors", bytes:sub(1, n)))
      assert.is_nil(set)
      assert.equal("format", code)
      assert.truthy(message:find("^" .. dir .. "/cut%.safetensors: [^\n]+$"))
    end
  end)

  it("opens or is refused in one line whatever byte of its header is wrong", function()
    local bytes = image('{"__metadata__":{"a":"b"},'
      .. '"x":{"dtype":"F16","shape":[2,3],"data_offsets":[3,15]},'
      .. '"y":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', "abcdefghijklmno")
    local path = path_of("flip.safetensors")
    local opened, failed = 0, 0
    for i = 1, #bytes - 15 do
      local byte = bytes:byte(i)
      for bit = 0, 7 do
        write("flip.safetensors", bytes:sub(1, i - 1) .. string.char(byte ~ (1 << bit))
          .. bytes:sub(i + 1))
        local set, message, code = safetensors.open(path)
        if set then
          opened = opened + 1
          for _, name in ipairs(set:names()) do
            assert.equal(set:info(name).bytes, #set:read(name))
          end
          set:close()
        else
          failed = failed + 1
          assert.truthy(message:find("^" .. dir .. "/flip%.safetensors: [^\n]+$"), message)
          assert.is_true(code == "format" or code == "unsupported")
        end
      end
    end
    -- A name or a metadata text may change unseen; structure, sizes and places may not.
    assert.is_true(opened > 0 and opened < 60, tostring(opened))
    assert.is_true(failed > 1000)
  end)
end)

describe("a checkpoint directory", function()
  it("without an index is all its files", function()
    write("model-00001-of-00002.safetensors", shard("b", "d"))
    write("model-00002-of-00002.safetensors", shard("a"))
    write("mtp.safetensors", shard("mtp.x"))
    write(".hidden.safetensors", "")
    write("model.safetensors.partial", "")
    write("config.json", "{}")
    assert.equal("a b d mtp.x", names(dir))
    assert.equal("a b d mtp.x", names(dir .. "/"))
    local set <close> = assert(safetensors.open(dir))
    assert.equal(path_of("mtp.safetensors"), set:info("mtp.x").file)
    assert.equal("mtp.x", set:read("mtp.x"))
  end)

  it("without an index has each name once", function()
    write("model-00001-of-00002.safetensors", shard("b", "a"))
    write("model-00002-of-00002.safetensors", shard("a"))
    local _, message = safetensors.open(dir)
    assert.truthy(message:find("tensor a is also in", 1, true))
  end)

  it("needs a file", function()
    refused(dir, "DIR: no .safetensors file", "io")
  end)

  it("with an index is what the index says", function()
    write("model.safetensors.index.json", index {
      a = "model-00001-of-00002.safetensors", b = "model-00002-of-00002.safetensors",
    })
    write("model-00001-of-00002.safetensors", shard("a", "not_listed"))
    write("model-00002-of-00002.safetensors", shard("b"))
    write("model-00003-of-00003.safetensors", "left over from another save")
    write("model.safetensors", shard("a", "b", "c"))
    write("mtp.safetensors", shard("mtp.x", "a"))
    write("vision.safetensors", shard("vision.x"))
    local set <close> = assert(safetensors.open(dir))
    assert.equal("a b mtp.x vision.x", table.concat(set:names(), " "))
    assert.equal(path_of("model-00001-of-00002.safetensors"), set:info("a").file)
  end)

  it("is refused where it does not keep the index's word", function()
    local first = write("model-00001-of-00002.safetensors", shard("a", "c"))
    write("model.safetensors.index.json", index {
      a = "model-00001-of-00002.safetensors", b = "model-00002-of-00002.safetensors",
    })
    refused(dir, "shard named by the index: DIR/model-00002-of-00002.safetensors: "
      .. "No such file or directory", "io")
    local second = write("model-00002-of-00002.safetensors", shard("x"))
    refused(dir, "DIR: tensor b is not in model-00002-of-00002.safetensors, "
      .. "where the index places it")
    write("model-00002-of-00002.safetensors", shard("a", "b"))
    refused(dir, second .. ": tensor a: the index places it in model-00001-of-00002.safetensors")
    write("model-00002-of-00002.safetensors", shard("b"):sub(1, -2))
    assert.truthy(select(2, safetensors.open(dir)):find(second .. ": tensor b: data ends at byte",
      1, true))
    os.remove(first)
  end)

  it("is refused when the index is broken", function()
    local path = write("model.safetensors.index.json", "{")
    refused(dir, path .. ": byte 1: unexpected end of JSON text")
    write("model.safetensors.index.json", '{"metadata": {}}')
    refused(dir, path .. ": no weight_map object")
    write("model.safetensors.index.json", "[]")
    refused(dir, path .. ": no weight_map object")
    for _, name in ipairs { "../model.safetensors", "/etc/passwd", "", "model.bin" } do
      write("model.safetensors.index.json", index { a = name })
      refused(dir, path .. ": tensor a: its shard is not a .safetensors file name")
    end
    write("model.safetensors.index.json", '{"weight_map": {"a": 1}}')
    refused(dir, path .. ": tensor a: its shard is not a .safetensors file name")
  end)

  it("takes no longer for a shard of its own for every tensor", function()
    local map = {}
    for i = 1, 100000 do map["t" .. i] = "s" .. (i * 7919) % 100003 .. ".safetensors" end
    write("model.safetensors.index.json", index(map))
    local begin = os.clock()
    refused(dir, "shard named by the index: DIR/s1.safetensors: No such file or directory", "io")
    assert.truthy(os.clock() - begin < 5)
  end)
end)

describe("files of other programs", function()
  local function check(path)
    local listed = assert(json.read(path .. "/model.safetensors.index.json"))
    local set <close> = assert(safetensors.open(path))
    local expected, total, odd = {}, 0, 0
    for name in pairs(listed.weight_map) do
      expected[#expected + 1] = name
      local info = assert(set:info(name), name)
      assert.equal(path .. "/" .. listed.weight_map[name], info.file)
      total = total + info.bytes
      odd = odd + info.offset % 4
    end
    table.sort(expected)
    assert.same(expected, set:names())
    assert.equal(listed.metadata.total_size, total)
    return odd
  end

  it("open: four shards of transformers", function()
    assert.equal(0, check("spec/golden/models/moe-wrapped/hf"))
  end)

  it("open: mlx-lm, whose data begins at any byte", function()
    assert.is_true(check("spec/golden/mlx/moe4/mlx") > 0)
  end)
end)
