-- OpenBLAS as calibration uses it: sums of outer products compared with sums in doubles.

local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local function gram_of(x, n, cols)
  local h = {}
  for i = 1, cols do
    for j = 1, cols do
      local sum = 0
      for t = 0, n - 1 do sum = sum + x[t * cols + i] * x[t * cols + j] end
      h[(i - 1) * cols + j] = sum
    end
  end
  return h
end

local function f32(values)
  return numbers.unpack(numbers.pack(values))
end

local function assert_near(expected, got, within)
  assert.equal(#expected, #got)
  for i, v in ipairs(expected) do
    local off = math.abs(v - got[i])
    if off > within or off ~= off then
      error(("element %d: %.9g expected, got %.9g"):format(i, v, got[i]))
    end
  end
end

local function values(tensor)
  return numbers.unpack(tensor:bytes())
end

describe("OpenBLAS", function()
  it("takes kernels for this processor", function()
    local level = core.kernels()[#core.kernels()].level
    local expected = ({ avx2 = "Haswell", avx512 = "SkylakeX" })[level]
    if expected and not os.getenv("OPENBLAS_CORETYPE") then
      assert.equal(expected, core.blas())
    else
      assert.is_string(core.blas())
    end
  end)

  it("is missed in one line that says what to install", function()
    local dir = os.tmpname()
    os.remove(dir)
    assert(os.execute(("mkdir %s && echo no > %s/libopenblas.so.0 && echo no > %s/libopenblas.so")
      :format(dir, dir, dir)))
    local program = "package.cpath = '" .. package.cpath .. "' " ..
      "print(select(2, require('moonlet.core').blas()))"
    local pipe <close> = assert(io.popen(("LD_LIBRARY_PATH=%s lua5.4 -e %q 2>&1")
      :format(dir, program)))
    local said = pipe:read("a")
    os.execute("rm -r " .. dir)
    assert.matches("^OpenBLAS is missing %(Debian: apt%-get install libopenblas0%): [^\n]+\n$",
      said)
  end)

  it("adds up outer products, whatever the number of threads", function()
    local jobs, expected = {}, {}
    for i, shape in ipairs { { 7, 3 }, { 0, 4 }, { 1, 20 }, { 33, 40 } } do
      local n, cols = table.unpack(shape)
      local x = f32(numbers.rng(i).floats(n * cols))
      jobs[i] = { x = numbers.pack(x), n = n, cols = cols }
      expected[i] = gram_of(x, n, cols)
    end
    for threads = 1, 3 do
      for i, tensor in ipairs(core.blas_gram(jobs, threads)) do
        assert_near(expected[i], values(tensor), 1e-5)
      end
    end
  end)

  it("raises on what is no job", function()
    assert.error_matches(function() core.blas_gram({ 5 }, 1) end, "job 1: not a table")
  end)

  it("cuts wide sums into the same tiles for one thread and for three", function()
    local n, cols = 5, 1100
    local x = f32(numbers.rng(9).floats(n * cols))
    local jobs = { { x = numbers.pack(x), n = n, cols = cols } }
    local one = core.blas_gram(jobs, 1)[1]:bytes()
    assert.is_true(one == core.blas_gram(jobs, 3)[1]:bytes())
    for _, at in ipairs { { 0, 0 }, { 511, 512 }, { 512, 511 }, { 1024, 3 }, { 1099, 1099 } } do
      local i, j, sum = at[1], at[2], 0
      for t = 0, n - 1 do sum = sum + x[t * cols + i + 1] * x[t * cols + j + 1] end
      local got = string.unpack("<f", one, 4 * (i * cols + j) + 1)
      assert.is_true(math.abs(got - sum) < 1e-5)
    end
  end)
end)
