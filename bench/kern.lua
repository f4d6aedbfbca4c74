-- Speed of matrix products and mixers:
--   lua5.4 bench/kern.lua [variant] [rows, or "memory"] [cols] [threads] [mode, or "mixers"]
-- One token in billions of weights per second; more tokens in GFLOP/s (2 per weight and token).
-- Activations in f32, then in 8 bits or in bf16 for the formats that take them. "memory": products
-- of one token with matrices of 256 MB, beside the speed at which as many threads read memory,
-- in rounds between two probes of it.

package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
package.cpath = "./build/?.so;" .. package.cpath
local bench = require "moonlet.bench"
local core = require "moonlet.core"

local kernels = core.kernels()
local variant = arg[1] or kernels[#kernels].name
local from_memory = arg[2] == "memory"
local rows, cols = tonumber(arg[2] or 512), tonumber(arg[3] or 2048)
local threads, only = tonumber(arg[4] or 1), arg[5]

local modes = {
  { mode = "f32", bits = 32 }, { mode = "f16", bits = 16 }, { mode = "bf16", bits = 16 },
  { mode = "affine", bits = 2 }, { mode = "affine", bits = 3 }, { mode = "affine", bits = 4 },
  { mode = "affine", bits = 5 }, { mode = "affine", bits = 6 }, { mode = "affine", bits = 8 },
  { mode = "mxfp4", bits = 4, group = 32 }, { mode = "mxfp8", bits = 8, group = 32 },
  { mode = "nvfp4", bits = 4, group = 16 }, { mode = "fp8", bits = 8, group = 128, tile_rows = 1 },
}

local function stop(text)
  io.stderr:write("kern: ", text, "\n")
  os.exit(2)
end

local function is_count(n, max)
  return math.type(n) == "integer" and n >= 1 and n <= max
end

-- Before anything is printed, as a table's head without a table says nothing.
local function check_arguments()
  local names, known = {}, {}
  for i, kernel in ipairs(kernels) do names[i], known[kernel.name] = kernel.name, true end
  if not known[variant] then
    stop(("no kernels named '%s' here; there are %s"):format(variant, table.concat(names, ", ")))
  end
  if not (from_memory or is_count(rows, 1 << 20)) then
    stop("rows: a whole number, or memory, expected")
  end
  if not is_count(cols, 1 << 20) or cols % 128 ~= 0 then
    stop("cols: a multiple of 128 expected")
  end
  if not is_count(threads, 1024) then stop("threads: 1 to 1024 expected") end
  local found = only == nil or (only == "mixers" and not from_memory)
  for _, m in ipairs(modes) do found = found or only == m.mode end
  if not found then stop(("no mode named '%s'"):format(only)) end
end

check_arguments()

local function matrix(m)
  local n_bytes = rows * cols * m.bits // 8
  local w = { mode = m.mode, bits = m.bits, rows = rows, cols = cols,
    codes = ("\x35\x2a\x1c"):rep(n_bytes // 3 + 1):sub(1, n_bytes) }
  if m.bits >= 16 then return w end
  w.group, w.tile_rows = m.group or 64, m.tile_rows
  local n = rows * (cols // w.group)
  local wide = m.mode == "affine" or m.mode == "fp8"
  w.scales = wide and ("\x80\x3c"):rep(n) or ("\x38"):rep(n)
  if m.mode == "affine" then w.biases = w.scales end
  return w
end

local FAST <const> = { affine = "int8", mxfp4 = "int8", nvfp4 = "int8", bf16 = "bf16",
  mxfp8 = "bf16", fp8 = "bf16" }

local function seconds(w, n_x, fast)
  local x = string.pack("<f", 0.01):rep(cols * n_x)
  local repeats = variant == "scalar" and 2 or math.max(5, 400000000 // (rows * cols * n_x))
  local _, best = core.kern_run(variant, "linear",
    { matrix = w, x = x, n_x = n_x, threads = threads, repeats = repeats, fast = fast ~= nil })
  return best
end

if not from_memory then
  print(("%s, %d x %d, %d threads"):format(variant, rows, cols, threads))
  print("mode       x     n=1 Gw/s     n=2     n=4     n=8    n=32   n=256 GFLOP/s")
end

local function report(m, w, fast)
  local line = { ("%-6s %2d %5s  %7.2f"):format(m.mode, m.bits, fast or "f32",
    rows * cols / seconds(w, 1, fast) / 1e9) }
  for _, n in ipairs { 2, 4, 8, 32, 256 } do
    line[#line + 1] = ("%7.1f"):format(2 * rows * cols * n / seconds(w, n, fast) / 1e9)
  end
  print(table.concat(line, " "))
end

local function probe()
  local speed, message = bench.bandwidth(threads, 256 << 20)
  return speed or stop(message)
end

-- Speeds of a matrix and of memory; nil where memory's changed too much meanwhile.
local function round_from_memory(w, n_bytes, fast)
  local before, speed, after = probe(), n_bytes / seconds(w, 1, fast), probe()
  local memory = (before + after) / 2
  if math.abs(after - before) > bench.STEADY * memory then return nil end
  return { speed = speed, memory = memory }
end

-- Of up to nine rounds those that are steady, until there are five; the one in the middle.
local function report_memory(m)
  local fast, rounds = FAST[m.mode], {}
  rows = (256 << 20) // (cols * m.bits // 8)
  local w = matrix(m)
  local n_bytes = #w.codes + #(w.scales or "") + #(w.biases or "")
  for _ = 1, 9 do
    if #rounds == 5 then break end
    rounds[#rounds + 1] = round_from_memory(w, n_bytes, fast)
  end
  local name = ("%-6s %2d %5s"):format(m.mode, m.bits, fast or "f32")
  if #rounds == 0 then
    print(name .. ": memory's speed changed too much in every round")
    return
  end
  local function share(round) return round.speed / round.memory end
  table.sort(rounds, function(a, b) return share(a) < share(b) end)
  local middle = rounds[(#rounds + 1) // 2]
  print(("%s %7.1f GB/s of %5.1f: %3.0f %% (%.0f to %.0f, %d rounds)"):format(name,
    middle.speed / 1e9, middle.memory / 1e9, 100 * share(middle), 100 * share(rounds[1]),
    100 * share(rounds[#rounds]), #rounds))
end

for _, m in ipairs(modes) do
  if only and only ~= m.mode then goto next end
  if from_memory then
    report_memory(m)
  else
    local w = matrix(m)
    report(m, w)
    if FAST[m.mode] then report(m, w, FAST[m.mode]) end
  end
  collectgarbage()
  ::next::
end
if from_memory then return end

-- The mixers: one block of positions against queries of one head of keys, tokens of one head's
-- recurrence. Operations are those of the formulas; everything lies in L2.

local function floats(n, x) return string.pack("<f", x or 0.01):rep(n) end

local function attend(n_q, ints)
  local dim, pages = 256, {}
  for i = 1, 8 do pages[i] = string.pack("<I2", 0x2e66):rep(32 * dim) end
  local _, _, _, best = core.kern_run(variant, "attend", { keys = pages, values = pages,
    f16 = true, n = 256, dim = dim, q = floats(n_q * dim), scale = 1 / 16, ints = ints,
    repeats = 50 })
  return 4 * 256 * dim * n_q / best / 1e9
end

local function attend_in_integers(n_q) return attend(n_q, true) end

local function delta(n)
  local _, _, best = core.kern_run(variant, "delta_rule", { S = floats(128 * 128),
    q = floats(n * 128), k = floats(n * 128), v = floats(n * 128), decay = floats(n, 0.9),
    beta = floats(n, 0.5), repeats = 50 })
  return 7 * 128 * 128 * n / best / 1e9
end

local function row(what, sizes, run)
  local line = { ("%-22s"):format(what) }
  for _, n in ipairs(sizes) do line[#line + 1] = ("%d: %6.1f"):format(n, run(n)) end
  print(table.concat(line, "   "))
end

if not only or only == "mixers" then
  row("attend f16, queries", { 1, 2, 4, 6, 8, 64 }, attend)
  row("attend integers", { 1, 2, 4, 6, 8, 64 }, attend_in_integers)
  row("delta rule, tokens", { 1, 4, 32 }, delta)
end
