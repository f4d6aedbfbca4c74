-- The GGUF container and the two imatrix forms, broken in every way that matters: each is one line
-- that names the file and the place.

local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"

local DIR = "spec/golden/imatrix/"
local path

before_each(function() path = os.tmpname() end)
after_each(function() os.remove(path) end)

local function refused(bytes, message, code)
  checkpoint.spit(path, bytes)
  local set, got, kind = core.imatrix_open { path }
  assert.is_nil(set)
  assert.equal(path .. ": " .. message, got)
  assert.equal(code or "format", kind)
end

local function opened(bytes)
  checkpoint.spit(path, bytes)
  return assert(core.imatrix_open { path })
end

-- ---- GGUF from parts ---------------------------------------------------------------------------

local function text(s) return string.pack("<s8", s) end
local function value(key, kind, bytes) return text(key) .. string.pack("<I4", kind) .. bytes end

local TYPE = value("general.type", 8, text("imatrix"))

local function tensor(name, dims, offset, kind)
  local parts = { text(name), string.pack("<I4", #dims) }
  for _, d in ipairs(dims) do parts[#parts + 1] = string.pack("<i8", d) end
  parts[#parts + 1] = string.pack("<I4I8", kind or 0, offset)
  return table.concat(parts)
end

local function image(values, tensors, data, align)
  local bytes = string.pack("<c4I4I8I8", "GGUF", 3, #tensors, #values)
    .. table.concat(values) .. table.concat(tensors)
  align = align or 32
  return bytes .. ("\0"):rep(-#bytes % align) .. (data or "")
end

local function floats(...)
  local parts = {}
  for i, x in ipairs { ... } do parts[i] = string.pack("<f", x) end
  local bytes = table.concat(parts)
  return bytes .. ("\0"):rep(-#bytes % 32)
end

local SUMS, COUNTS = tensor("a.in_sum2", { 2 }, 0), tensor("a.counts", { 1 }, 32)
local DATA = floats(3, 5) .. floats(2)

describe("GGUF", function()
  it("is read when it is whole", function()
    local set <close> = opened(image({ TYPE }, { SUMS, COUNTS }, DATA))
    assert.same({ "a" }, set:names())
    local bytes, tokens = set:mean_squares("a", 1, 0)
    assert.equal(string.pack("<ff", 1.5, 2.5), bytes)
    assert.equal(2, tokens)
  end)

  it("is read in version 2, with any alignment and values of every kind", function()
    local values = { TYPE, value("general.alignment", 4, string.pack("<I4", 1)) }
    for kind, size in pairs { [0] = 1, 1, 2, 2, 4, 4, 4, 1, [10] = 8, [11] = 8, [12] = 8 } do
      values[#values + 1] = value("k" .. kind, kind, ("\1"):rep(size))
      values[#values + 1] = value("l" .. kind, 9, string.pack("<I4I8", kind, 3)
        .. ("\1"):rep(3 * size))
    end
    values[#values + 1] = value("m", 9, string.pack("<I4I8", 8, 2) .. text("a") .. text(""))
    local bytes = image(values, { SUMS, tensor("a.counts", { 1 }, 8) },
      string.pack("<fff", 3, 5, 2), 1)
    local set <close> = opened(bytes:sub(1, 4) .. string.pack("<I4", 2) .. bytes:sub(9))
    assert.equal(string.pack("<ff", 1.5, 2.5), (set:mean_squares("a", 1, 0)))
  end)

  it("is refused wherever it is cut", function()
    local whole = checkpoint.slurp(DIR .. "moe.gguf")
    for n = 4, #whole - 32, 7 do
      checkpoint.spit(path, whole:sub(1, n))
      local set, message, code = core.imatrix_open { path }
      assert.is_nil(set)
      assert.equal("format", code)
      assert.truthy(message:find(path, 1, true) and not message:find("\n"))
    end
  end)

  it("is refused for versions and bytes that are not its own", function()
    refused("GGUF" .. string.pack("<I4I8I8", 1, 0, 0), "GGUF version 1, only 2 and 3 are read",
      "unsupported")
    refused("GGUF" .. string.pack(">I4I8I8", 3, 0, 0), "a big-endian GGUF file", "unsupported")
    refused("GGUF" .. string.pack("<I4I8I8", 3, 1 << 60, 0),
      "byte 8: the number of tensors is 1152921504606846976, 8 bytes follow")
    refused("GGUF" .. string.pack("<I4I8i8", 3, 0, -1),
      "byte 16: the number of values is 18446744073709551615, 0 bytes follow")
  end)

  it("is refused for what values cannot be", function()
    refused(image({ value("k", 13, "\0") }, {}), "byte 33: value k is of unknown kind 13",
      "unsupported")
    refused(image({ value("k", 9, string.pack("<I4I8", 9, 1)) }, {}),
      "byte 37: value k is of unknown kind 9", "unsupported")
    refused(image({ value("k", 9, string.pack("<I4i8", 4, -1)) }, {}),
      "byte 41: the length of an array is 18446744073709551615, 15 bytes follow")
    refused(image({ value("", 0, "\0") }, {}), "byte 24: the key of a value is empty, longer than "
      .. "65535 bytes or has control characters")
    refused(image({ TYPE, TYPE }, {}), "value general.type is there twice")
    for _, n in ipairs { 0, 3, 1 << 21 } do
      refused(image({ TYPE, value("general.alignment", 4, string.pack("<I4", n)) }, {}),
        "general.alignment is no power of two up to 1048576")
    end
  end)

  it("is refused for what tensors cannot be", function()
    refused(image({ TYPE }, { tensor("a", { 1 }, 0, 5) }, floats(1)), "tensor a: unknown type 5",
      "unsupported")
    refused(image({ TYPE }, { tensor("a", { 1, 1, 1, 1, 1 }, 0) }, floats(1)),
      "tensor a: more than 4 dimensions", "unsupported")
    refused(image({ TYPE }, { tensor("a", { 1 << 40, 1 << 40 }, 0) }, floats(1)),
      "tensor a: more than 2^63 elements")
    refused(image({ TYPE }, { tensor("a", { -1 }, 0) }, floats(1)),
      "tensor a: more than 2^63 elements")
    refused(image({ TYPE }, { tensor("a", { 1 << 61 }, 0) }, floats(1)),
      "tensor a: more than 2^63 bytes")
    refused(image({ TYPE }, { tensor("a", { 33 }, 0, 8) }, floats(1)),
      "tensor a: rows of 33 do not divide into blocks of 32")
    refused(image({ TYPE }, { SUMS, tensor("a.counts", { 1 }, 0) }, DATA),
      "tensor a.counts: its offset is 0, 32 expected")
    refused(image({ TYPE }, { SUMS, tensor("a.in_sum2", { 2 }, 32) }, DATA),
      "tensor a.in_sum2 is there twice")
    refused(image({ TYPE }, { tensor("a.in_sum2", { 99 }, 0) }, DATA),
      "tensor a.in_sum2: 396 bytes from byte 128 on are not in the file of 192 (truncated?)")
  end)
end)

describe("an imatrix in GGUF", function()
  it("says so itself", function()
    refused(image({}, { SUMS, COUNTS }, DATA), "not an imatrix: general.type says otherwise")
    refused(image({ value("general.type", 8, text("model")) }, { SUMS, COUNTS }, DATA),
      "not an imatrix: general.type says otherwise")
    refused(image({ TYPE }, {}), "an imatrix without entries")
  end)

  it("has whole entries", function()
    refused(image({ TYPE }, { SUMS }, DATA), "entry a has no counts")
    refused(image({ TYPE }, { tensor("a.counts", { 1 }, 0) }, DATA), "entry a has no in_sum2")
    refused(image({ TYPE }, { tensor("a.in_sum2", { 2, 3 }, 0), tensor("a.counts", { 2 }, 32) },
      DATA), "entry a: 2 inputs, 3 matrices, 2 counts")
    refused(image({ TYPE }, { SUMS, COUNTS, tensor("a.in_sum", { 3 }, 64) }, DATA .. floats(1)),
      "entry a: 3 numbers in in_sum, 2 in in_sum2")
    refused(image({ TYPE }, { SUMS, tensor("a.counts", { 1 }, 32, 1) }, DATA),
      "tensor a.counts is not F32", "unsupported")
  end)

  it("has numbers that can be", function()
    local parts = { SUMS, COUNTS, tensor("a.in_sum", { 2 }, 64) }
    refused(image({ TYPE }, parts, floats(3, 0 / 0) .. floats(2) .. floats(0, 0)),
      ("entry a: number 1 of in_sum2 is %s"):format(("%g"):format(0 / 0)))
    refused(image({ TYPE }, parts, floats(-1, 0) .. floats(2) .. floats(0, 0)),
      "entry a: number 0 of in_sum2 is -1")
    refused(image({ TYPE }, parts, floats(1, 0) .. floats(-2) .. floats(0, 0)),
      "entry a: number 0 of counts is -2")
    refused(image({ TYPE }, parts, floats(1, 0) .. floats(0.5) .. floats(0, 0)),
      "entry a: count 0 is 0.5")
    refused(image({ TYPE }, parts, floats(1, 0) .. floats(2) .. floats(-5, math.huge)),
      "entry a: number 1 of in_sum is inf")
  end)
end)

describe(".dat", function()
  local function entry(name, calls, ...)
    local parts = { string.pack("<i4", #name), name, string.pack("<i4i4", calls, select("#", ...)) }
    for _, x in ipairs { ... } do parts[#parts + 1] = string.pack("<f", x) end
    return table.concat(parts)
  end
  local function dat(...)
    return string.pack("<i4", select("#", ...)) .. table.concat { ... }
  end

  it("is read with every trailer there has been", function()
    for _, trailer in ipairs { "", string.pack("<i4", 9), string.pack("<i4i4", 9, 0),
      string.pack("<i4s4", 9, "text") } do
      local set <close> = opened(dat(entry("a", 2, 3, 5)) .. trailer)
      assert.equal(string.pack("<ff", 1.5, 2.5), (set:mean_squares("a", 1, 0)))
      local info = set:info()
      assert.equal(#trailer > 0 and 9 or 0, info.chunk_count)
      assert.same(#trailer > 8 and { "text" } or {}, info.datasets)
    end
  end)

  it("takes values as they are where it counted no calls", function()
    local set <close> = opened(dat(entry("a", 0, 3, 5)))
    assert.equal(string.pack("<ff", 3, 5), (set:mean_squares("a", 1, 0)))
  end)

  it("is refused where it is broken", function()
    refused("", "byte 0: the file ends inside the number of entries")
    refused(("x"):rep(100), "not an imatrix: neither GGUF nor .dat")
    refused(dat(), "not an imatrix: neither GGUF nor .dat")
    refused(dat(entry("a\n", 1, 1)), "byte 4: not the name of an entry (no imatrix?)")
    refused(dat(entry("", 1, 1, 2)), "byte 4: not the name of an entry (no imatrix?)")
    refused(dat(entry("a", 1, 1), entry("", 1, 1)), "byte 21: not the name of an entry")
    refused(dat(entry("a", 1)) .. "\0\0\0", "entry a: 0 values, 3 bytes follow")
    refused(dat(entry("a", 1, 1, 2)):sub(1, -2), "entry a: 2 values, 7 bytes follow")
    refused(dat(entry("a", 1, 1), entry("a", 1, 1)), "entry a is there twice")
    refused(dat(entry("a", 1, 1, 2)) .. "\1", "byte 25: the file ends inside the number of chunks")
    refused(dat(entry("a", 1, 1)) .. string.pack("<i4i4", 1, 5) .. "text",
      "byte 25: the name of the data set has 5 bytes, 4 follow")
    refused(dat(entry("a", 1, 1)) .. string.pack("<i4s4", 1, "text") .. "x",
      "byte 33: bytes behind the end")
    refused(dat(entry("a", 1, 0 / 0)),
      ("entry a: number 0 of in_sum2 is %s"):format(("%g"):format(0 / 0)))
  end)

  it("that is not there names the path", function()
    local set, message, code = core.imatrix_open { "/nowhere/x.dat" }
    assert.is_nil(set)
    assert.equal("/nowhere/x.dat: No such file or directory", message)
    assert.equal("io", code)
  end)
end)

describe("several files", function()
  it("must agree", function()
    local other = os.tmpname()
    checkpoint.spit(path, image({ TYPE }, { SUMS, COUNTS }, DATA))
    checkpoint.spit(other, image({ TYPE }, { tensor("a.in_sum2", { 3 }, 0), COUNTS }, DATA))
    local set, message = core.imatrix_open { path, other }
    assert.is_nil(set)
    assert.equal(other .. ": entry a: 3 numbers, 2 in the files before", message)
    checkpoint.spit(path, image({ TYPE }, { tensor("a.in_sum2", { 1, 6 }, 0),
      tensor("a.counts", { 6 }, 32) }, DATA))
    checkpoint.spit(other, image({ TYPE }, { tensor("a.in_sum2", { 1, 6 }, 0), COUNTS }, DATA))
    local sum <close> = assert(core.imatrix_open { path, other })
    assert.same({ 4, 2, 2, 2, 2, 2 }, sum:tokens("a", 6))
    os.remove(other)
  end)

  it("give entries that only one has", function()
    local other = os.tmpname()
    checkpoint.spit(path, image({ TYPE }, { SUMS, COUNTS }, DATA))
    checkpoint.spit(other, image({ TYPE }, { tensor("b.in_sum2", { 2 }, 0),
      tensor("b.counts", { 1 }, 32) }, floats(8, 8) .. floats(4)))
    local set <close> = assert(core.imatrix_open { path, other })
    assert.same({ "a", "b" }, set:names())
    assert.equal(string.pack("<ff", 2, 2), (set:mean_squares("b", 1, 0)))
    os.remove(other)
  end)
end)
