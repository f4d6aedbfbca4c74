local safetensors = require "moonlet.safetensors"

local path

local function read_file(name)
  local file = io.open(name, "rb")
  if not file then
    return nil
  end
  local bytes = file:read("a")
  file:close()
  return bytes
end

before_each(function()
  path = os.tmpname()
end)

after_each(function()
  os.remove(path)
  os.remove(path .. ".partial")
end)

local function entries()
  return {
    { name = "w", dtype = "F32", shape = { 2, 1 }, data = string.pack("<ff", 1.5, -2) },
    { name = 'a "b"\u{e9}', dtype = "U8", shape = { 3 }, data = "abc" },
    { name = "none", dtype = "I64", shape = { 0, 5 }, data = "" },
    { name = "scalar", dtype = "BF16", shape = {}, data = "\0\1" },
  }
end

describe("writing safetensors", function()
  it("lays a file out as the format says", function()
    assert.is_true(safetensors.write(path, entries(), { format = "mlx", a = "1" }))
    local header = '{"__metadata__":{"a":"1","format":"mlx"},'
      .. '"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
      .. '"a \\"b\\"\u{e9}":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},'
      .. '"none":{"dtype":"I64","shape":[0,5],"data_offsets":[11,11]},'
      .. '"scalar":{"dtype":"BF16","shape":[],"data_offsets":[11,13]}}'
    header = header .. (" "):rep(-(#header + 8) % 64)
    assert.equal(string.pack("<I8", #header) .. header
      .. string.pack("<ff", 1.5, -2) .. "abc" .. "\0\1", read_file(path))
    assert.is_nil(read_file(path .. ".partial"))
  end)

  it("gives back what was written", function()
    assert(safetensors.write(path, entries(), { format = "mlx" }))
    local set <close> = assert(safetensors.open(path))
    for _, entry in ipairs(entries()) do
      assert.equal(entry.data, set:read(entry.name))
      assert.same(entry.shape, set:info(entry.name).shape)
      assert.equal(entry.dtype, set:info(entry.name).dtype)
    end
    assert.equal("mlx", set:metadata("format"))
  end)

  it("writes a file without tensors", function()
    assert(safetensors.write(path, {}))
    assert.equal(string.pack("<I8", 56) .. "{}" .. (" "):rep(54), read_file(path))
    assert(safetensors.write(path, {}, { a = "b" }))
    local set <close> = assert(safetensors.open(path))
    assert.same({}, set:names())
    assert.equal("b", set:metadata("a"))
  end)

  it("replaces a file only when the new one is whole", function()
    assert(safetensors.write(path, entries()))
    local before = read_file(path)
    local ok, message, code = safetensors.write(path, {
      { name = "x", dtype = "U8", shape = { 1 }, data = "x" },
      { name = "x", dtype = "U8", shape = { 1 }, data = "y" },
    })
    assert.is_nil(ok)
    assert.equal(path .. ": tensor x is given twice", message)
    assert.equal("range", code)
    assert.equal(before, read_file(path))
    assert.is_nil(read_file(path .. ".partial"))
    assert(safetensors.write(path, { { name = "x", dtype = "U8", shape = { 1 }, data = "x" } }))
    assert.equal("x", read_file(path):sub(-1))
  end)

  it("reports a directory that is not there", function()
    local ok, message, code = safetensors.write(path .. "/no/f.safetensors", entries())
    assert.is_nil(ok)
    assert.equal(("%s/no/f.safetensors: %s/no: cannot find: Not a directory"):format(path, path),
      message)
    assert.equal("io", code)
  end)

  it("reports a full disk before anything is written", function()
    -- A file size limit stands for the disk: both come back from the reservation.
    local script = ([[
      local core = require "moonlet.core"
      local data = ("x"):rep(4 << 20)
      print(core.st_write(%q, { { name = "t", dtype = "U8", shape = { #data }, data = data } }))
    ]]):format(path .. ".big")
    local name = os.tmpname()
    local file = assert(io.open(name, "w"))
    file:write(("package.cpath = %q\n"):format(package.cpath), script)
    file:close()
    local pipe = assert(io.popen("trap '' XFSZ; ulimit -f 64; exec lua5.4 " .. name .. " 2>&1"))
    local output = pipe:read("a")
    pipe:close()
    os.remove(name)
    assert.equal("nil\t" .. path
      .. ".big.partial: cannot reserve 4194432 bytes: File too large\tio\n", output)
    assert.is_nil(read_file(path .. ".big"))
    assert.is_nil(read_file(path .. ".big.partial"))
  end)

  it("returns what the format has no room for", function()
    for _, name in ipairs { "", "a\nb", "__metadata__", ("n"):rep(256) } do
      local ok, message, code = safetensors.write(path, {
        { name = name, dtype = "U8", shape = {}, data = "x" },
      })
      assert.is_nil(ok)
      assert.equal(path .. ": tensor 0 has no usable name", message)
      assert.equal("range", code)
    end
  end)

  it("raises on misuse", function()
    local function raises(entry, message, metadata)
      local ok, raised = pcall(safetensors.write, path, { entry }, metadata)
      assert.is_false(ok)
      assert.truthy(raised:find(message, 1, true), raised)
    end
    raises(1, "entry 1 is not a table")
    raises({}, "entry 1: field 'name' is not a string")
    raises({ name = "t" }, "entry 1: field 'dtype' is not a string")
    raises({ name = "t", dtype = "F5" }, "tensor t: unknown dtype 'F5'")
    raises({ name = "t", dtype = "U8" }, "tensor t: field 'shape' is not a table")
    raises({ name = "t", dtype = "U8", shape = { -1 } }, "tensor t: shape is no list of sizes")
    raises({ name = "t", dtype = "U8", shape = { 1.5 } }, "tensor t: shape is no list of sizes")
    raises({ name = "t", dtype = "U8", shape = { 1, 1, 1, 1, 1, 1, 1, 1, 1 } },
      "tensor t: more than 8 dimensions")
    raises({ name = "t", dtype = "U8", shape = { 1 } }, "entry 1: field 'data' is not a string")
    raises({ name = "t", dtype = "F32", shape = { 2 }, data = "1234" },
      "tensor t: 4 bytes of data do not fit dtype and shape")
    raises({ name = "t", dtype = "U8", shape = { math.maxinteger, 2 }, data = "" },
      "tensor t: 0 bytes of data do not fit dtype and shape")
    raises({ name = "t", dtype = "U8", shape = {}, data = "x", offset = 1 },
      "unknown option 'offset'")
    raises({ name = "t", dtype = "U8", shape = {}, data = "x" },
      "metadata: keys and values must be strings", { a = 1 })
    assert.equal("", read_file(path))
  end)
end)
