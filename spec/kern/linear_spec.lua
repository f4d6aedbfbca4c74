-- Products over the pool: the same bits for any number of threads and any batch.

local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local function affine4(rng, rows, cols)
  return { mode = "affine", bits = 4, group = 32, rows = rows, cols = cols,
    codes = rng.bytes(rows * cols // 2),
    scales = ("\x80\x3c"):rep(rows * cols // 32), biases = ("\x00\xbe"):rep(rows * cols // 32) }
end

describe("linear", function()
  it("does not depend on the number of threads", function()
    local rng = numbers.rng(1)
    for _, shape in ipairs { { 1, 32 }, { 70, 64 }, { 300, 1024 }, { 9, 10240 } } do
      local m = affine4(rng, shape[1], shape[2])
      for _, n_x in ipairs { 1, 5, 40 } do
        local x = numbers.pack(rng.floats(n_x * m.cols))
        for _, variant in ipairs(core.kernels()) do
          if variant.name ~= "scalar" or n_x < 40 then
            local args = { matrix = m, x = x, n_x = n_x, threads = 1 }
            local alone = core.kern_run(variant.name, "linear", args)
            for _, threads in ipairs { 2, 4 } do
              args.threads = threads
              assert.equal(alone, (core.kern_run(variant.name, "linear", args)))
            end
          end
        end
      end
    end
  end)

  it("gives a token the same bits in any batch", function()
    local rng = numbers.rng(2)
    local m = affine4(rng, 77, 96)
    local one, many = {}, 37
    local x = {}
    for t = 1, many do x[t] = numbers.pack(rng.floats(m.cols)) end
    for _, variant in ipairs(core.kernels()) do
      for t = 1, many do
        one[t] = core.kern_run(variant.name, "linear", { matrix = m, x = x[t], n_x = 1 })
      end
      for n = 2, many do
        local y = core.kern_run(variant.name, "linear",
          { matrix = m, x = table.concat(x, "", 1, n), n_x = n })
        assert.equal(table.concat(one, "", 1, n), y)
      end
    end
  end)

  it("is a product with the decoded matrix", function()
    local rng = numbers.rng(3)
    local m = affine4(rng, 20, 64)
    local w, x = numbers.unpack(core.decode_rows(m)), rng.floats(64)
    for _, variant in ipairs(core.kernels()) do
      local y = numbers.unpack(
        core.kern_run(variant.name, "linear", { matrix = m, x = numbers.pack(x), n_x = 1 }))
      for r = 0, 19 do
        local sum = 0
        for j = 1, 64 do sum = sum + w[r * 64 + j] * x[j] end
        assert.near(sum, y[r + 1], 1e-5)
      end
    end
  end)

  it("runs several products in one region", function()
    local rng = numbers.rng(4)
    local matrices, xs = {}, {}
    for i, shape in ipairs { { 3, 32 }, { 200, 64 }, { 64, 2048 }, { 65, 512 }, { 1, 96 } } do
      matrices[i] = affine4(rng, shape[1], shape[2])
      xs[i] = numbers.pack(rng.floats(shape[2] * (i % 3 + 1)))
    end
    for _, variant in ipairs(core.kernels()) do
      for _, threads in ipairs { 1, 3 } do
        local ys = core.kern_run(variant.name, "jobs",
          { matrices = matrices, xs = xs, threads = threads })
        for i, m in ipairs(matrices) do
          local y = core.kern_run(variant.name, "linear",
            { matrix = m, x = xs[i], n_x = i % 3 + 1 })
          assert.equal(y, ys[i])
        end
      end
    end
  end)
end)
