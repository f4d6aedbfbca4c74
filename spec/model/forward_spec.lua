-- The forward pass against transformers, mlx-lm and compressed-tensors in float32.
-- Tolerances are those of the READMEs beside the data.
local core = require "moonlet.core"
local golden = require "spec.support.golden"

local function open(dir, threads)
  return assert(core.model_open(dir, { threads = threads or 2 }))
end

local function session(model, n, kv)
  return assert(model:session { ctx = n, kv = kv or "f32" })
end

local function near(got, want, tolerance, what, first)
  local d = golden.distance(got, want, first)
  assert(d <= tolerance, ("%s: off by %g, allowed %g"):format(what, d, tolerance))
end

local function argmax(values, first, n)
  local best = 1
  for i = 2, n do
    if values[first + i] > values[first + best] then best = i end
  end
  return best - 1
end

-- [Nv][Dv][Dk] as we keep it -> [Nv][Dk][Dv] as the golden files have it
local function transpose_state(values, shape)
  local out, n = {}, 0
  local heads, dv, dk = table.unpack(shape)
  for h = 0, heads - 1 do
    for i = 0, dk - 1 do
      for j = 0, dv - 1 do
        n = n + 1
        out[n] = values[(h * dv + j) * dk + i + 1]
      end
    end
  end
  return out
end

local function greedy(model, ids, n)
  local ses <close> = session(model, #ids + n)
  assert(ses:eval(ids))
  local out = {}
  for i = 1, n do
    out[i] = ses:logits():argmax()
    assert(ses:eval { out[i] })
  end
  return out
end

local function check_short(model, g, tolerance)
  local moe = model:info().config.num_experts > 0
  local ids = g["short.ids"]
  local out = assert(model:forward(ids, { "logits", "hidden", moe and "router" or nil }))
  near(golden.floats(out.logits), g["short.logits"], tolerance, "logits")
  near(golden.floats(out.hidden), g["short.hidden"], tolerance, "hidden")
  near(golden.floats(out.final), g["short.final"], tolerance, "final")
  if moe then
    local ids_of, weights_of = {}, {}
    for _, layer in ipairs(out.router) do
      for _, v in ipairs(golden.ints(layer.ids)) do ids_of[#ids_of + 1] = v end
      for _, v in ipairs(golden.floats(layer.weights)) do weights_of[#weights_of + 1] = v end
    end
    assert.same(g["short.router.ids"], ids_of)
    near(weights_of, g["short.router.weights"], tolerance, "router weights")
  end
  if g["greedy.ids"] then
    assert.same(g["greedy.ids"], greedy(model, ids, #g["greedy.ids"]))
  end
end

local function check_long(model, g, tolerance)
  local ids, V = g["long.ids"], model:info().config.vocab_size
  local out = assert(model:forward(ids, { "logits", "hidden" }))
  local logits, hidden = golden.floats(out.logits), golden.floats(out.hidden)
  for i, pos in ipairs(g["long.positions"]) do
    near(logits, golden.slice(g["long.logits"], (i - 1) * V, V), tolerance,
      "logits at " .. pos, pos * V)
  end
  local best = {}
  for i = 1, #ids do best[i] = argmax(logits, (i - 1) * V, V) end
  assert.same(g["long.argmax"], best)

  local L1, n, H = table.unpack(out.hidden:shape())
  for layer = 0, L1 - 1 do
    near(hidden, golden.slice(g["long.hidden_last"], layer * H, H), tolerance,
      "last hidden of layer " .. layer, (layer * n + n - 1) * H)
  end

  local ses <close> = session(model, #ids)
  local targets = table.move(ids, 2, #ids, 1, {})
  targets[#ids] = -1
  local nll = golden.floats(assert(ses:score(ids, targets)))
  near(nll, g["long.nll"], tolerance, "nll")
  assert.equal(0, nll[#ids])

  local state, conv = ses:linear_state(g["long.linear_layer"][1])
  near(transpose_state(golden.floats(state), state:shape()), g["long.recurrent"], 2e-5, "state")
  near(golden.floats(conv), g["long.conv"], 2e-5, "convolution rows")
  local width = #g["long.key"] // #g["long.kv_positions"]
  for i, pos in ipairs(g["long.kv_positions"]) do
    local key, value = ses:kv_row(g["long.full_layer"][1], pos)
    local at = (i - 1) * width
    near(golden.floats(key), golden.slice(g["long.key"], at, width), 2e-5, "key at " .. pos)
    near(golden.floats(value), golden.slice(g["long.value"], at, width), 2e-5, "value at " .. pos)
  end
end

describe("forward pass, transformers' float32 results:", function()
  local models = { ["dense-text"] = 1e-4, ["dense-tied"] = 1e-3, ["moe-text"] = 1e-4,
    ["moe-wrapped"] = 1e-4 }
  for name, tolerance in pairs(models) do
    local dir = "spec/golden/models/" .. name
    it(name .. ", short prompt", function()
      local model <close> = open(dir .. "/hf")
      check_short(model, golden.open(dir .. "/golden.safetensors"), tolerance)
    end)
    it(name .. ", long prompt", function()
      local model <close> = open(dir .. "/hf")
      check_long(model, golden.open(dir .. "/golden.safetensors"), tolerance)
    end)
  end

  it("dense-text with YaRN", function()
    local dir = "spec/golden/models/dense-text"
    local copy = os.tmpname()
    os.remove(copy)
    assert(os.execute(("mkdir %s && cp %s/hf/model.safetensors %s && cp %s/hf/config.yarn.json "
      .. "%s/config.json"):format(copy, dir, copy, dir, copy)))
    local model <close> = open(copy)
    check_long(model, golden.open(dir .. "/golden.yarn.safetensors"), 1e-4)
    os.execute("rm -r " .. copy)
  end)

  it("multi-token prediction, prompt rows and drafts", function()
    local dir = "spec/golden/models/moe-wrapped"
    local model <close> = open(dir .. "/hf")
    local g = golden.open(dir .. "/golden.safetensors")
    local ids = g["short.ids"]
    local out = assert(model:forward(ids, { "mtp" }))
    assert.same(g["mtp.next_ids"], golden.ints(out.mtp.next_ids))
    near(golden.floats(out.mtp.hidden), g["mtp.hidden"], 1e-4, "mtp hidden")
    near(golden.floats(out.mtp.logits), g["mtp.logits"], 1e-4, "mtp logits")

    local ses <close> = session(model, 64)
    assert(ses:eval(ids))
    local hidden, logits = ses:mtp(0, out.final:bytes(), g["mtp.next_ids"])
    local draft, row_bytes = {}, model:info().config.hidden_size * 4
    for i = 1, #g["mtp.draft"] do
      local n = logits:shape()[1]
      draft[i] = logits:row(n):argmax()
      local last = hidden:bytes():sub(-row_bytes)
      hidden, logits = ses:mtp(#ids + i - 1, last, { draft[i] })
    end
    assert.same(g["mtp.draft"], draft)
  end)
end)

describe("forward pass, mlx-lm's float32 results:", function()
  local function check(dir, file)
    local g = golden.open(file)
    local model <close> = open(dir)
    for name, ids in pairs(g) do
      local n = name:match("^ids%.(%d+)$")
      if n then
        local out = assert(model:forward(ids, { "logits" }))
        local want = g["logits." .. n]
        near(golden.floats(out.logits), want, 5e-4 * golden.rms(want), "logits of " .. n)
        if not dir:find("dense4") then
          assert.same(g["greedy." .. n], greedy(model, ids, #g["greedy." .. n]))
        end
      end
    end
  end
  for _, name in ipairs { "moe4", "dense4" } do
    local dir = "spec/golden/mlx/" .. name
    it(name .. " quantized", function() check(dir .. "/mlx", dir .. "/golden.safetensors") end)
    it(name .. " dense", function() check(dir .. "/hf", dir .. "/golden-hf.safetensors") end)
  end
  it("moe4 with nvfp4 tensor scales", function()
    check("spec/golden/mlx/moe4/mlx-nvfp4gs", "spec/golden/mlx/moe4/golden-nvfp4gs.safetensors")
  end)
end)

it("forward pass of a mixed compressed-tensors checkpoint", function()
  local g = golden.open("spec/golden/ct/model-mixed/golden.safetensors")
  local model <close> = open("spec/golden/ct/model-mixed/checkpoint")
  local V = model:info().config.vocab_size
  local short = assert(model:forward(g["short.ids"], { "logits" }))
  near(golden.floats(short.logits), g["exact.short.logits"], 1e-3, "short logits")
  local long = golden.floats(assert(model:forward(g["long.ids"], { "logits" })).logits)
  for i, pos in ipairs(g["long.positions"]) do
    near(long, golden.slice(g["exact.long.logits"], (i - 1) * V, V), 1e-3, "logits at " .. pos,
      pos * V)
  end
end)

describe("a sequence gives the same bits", function()
  local dirs = { "spec/golden/models/moe-wrapped/hf", "spec/golden/models/dense-text/hf",
    "spec/golden/mlx/moe4/mlx", "spec/golden/ct/model-mixed/checkpoint" }

  local function prompt(model, n)
    local ids, V = {}, model:info().config.vocab_size
    for i = 1, n do ids[i] = (i * i * 7 + i * 3) % V end
    return ids
  end

  -- bytes of the logits after the last token and of the first linear state
  local function run(dir, threads, sizes, kv, n)
    local model <close> = open(dir, threads)
    local ids = prompt(model, n)
    local ses <close> = session(model, n, kv)
    local at, turn = 0, 0
    while at < n do
      turn = turn + 1
      local size = math.min(sizes[(turn - 1) % #sizes + 1], n - at)
      assert(ses:eval(table.move(ids, at + 1, at + size, 1, {})))
      at = at + size
    end
    local _, values = ses:logits():topk(model:info().config.vocab_size)
    local state = ses:linear_state(0)
    return string.pack(("d"):rep(#values), table.unpack(values)) .. state:bytes()
  end

  for _, dir in ipairs(dirs) do
    it("however it is cut: " .. dir, function()
      for _, kv in ipairs { "f32", "f16" } do
        local whole = run(dir, 2, { 290 }, kv, 290)
        assert.equal(whole, run(dir, 2, { 1 }, kv, 290))
        assert.equal(whole, run(dir, 2, { 3, 64, 1, 37, 7 }, kv, 290))
      end
    end)
    it("with 1, 2 and 4 threads: " .. dir, function()
      -- the last ones see two blocks of the softmax, which threads share
      local one = run(dir, 1, { 250, 5 }, "f16", 262)
      assert.equal(one, run(dir, 2, { 250, 5 }, "f16", 262))
      assert.equal(one, run(dir, 4, { 250, 5 }, "f16", 262))
    end)
  end

  it("knows what may be wanted", function()
    local model <close> = assert(core.model_open("spec/golden/models/moe-text/hf", { threads = 1 }))
    for word, shown in pairs { logit = "logit", [1] = "1" } do
      assert.error_matches(function() model:forward({ 1 }, { word }) end,
        "want: '" .. shown .. "' is none of logits, hidden, router, mtp", nil, true)
    end
  end)
end)
