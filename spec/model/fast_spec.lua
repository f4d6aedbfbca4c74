-- Precision fast: 8-bit activations for quantized matrices, bf16 ones for bf16, attention in
-- integers. Close to exact, and like exact the same bits on every instruction set, for every number
-- of threads and however a prompt is cut.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local moonlet = require "moonlet"

local DEMO <const> = "examples/demo-model"
local TEXT <const> = [[
The lighthouse keeper wrote every evening what the sea had been like. On the ninth of March
he wrote: calm, a sail in the east. On the tenth he wrote nothing at all, because the lamp had
gone out and he had climbed the stairs four times with oil.
def mean(values):
    return sum(values) / len(values)
]]

-- Mean KLD of fast against exact over TEXT, 1e-4 nats: 4.5, 3.1, 3.9, 2.9, 3.5, 0.4.
local FORMATS <const> = {
  { recipe = "uniform", mode = "mxfp4" },
  { recipe = "uniform", mode = "nvfp4" },
  { recipe = "uniform", bits = 4, group = 64 },
  { recipe = "uniform", bits = 8, group = 32 },
  { recipe = "mixed_3_6" },
  { recipe = "uniform", mode = "mxfp8" },
}
local LIMIT <const> = 1e-3
-- Where no matrix is quantized, activations are rounded to bf16, and attention: 0.4 to 0.5.
local BF16_LIMIT <const> = 5e-5

local CHILD <const> = [[
package.path, package.cpath = %q, %q
local model <close> = assert(require("moonlet").open(%q, { threads = 2 }))
local ids = assert(model:encode(%q))
local f <close> = assert(io.open(%q, "wb"))
f:write(assert(model:forward(ids)).logits:bytes()) -- with keys and values in f32
local session <close> = assert(model:session { ctx = 256, kv = "f16" })
assert(session:sync(ids))
local fork <close> = assert(session:fork()) -- one of them copies the last page
for id, each in ipairs { session, fork } do
  assert(each:step(id))
  local _, values = each:logits():topk(1000)
  for _, value in ipairs(values) do f:write(string.pack("<f", value)) end
end
io.write(model:info().kernels)
]]

describe("precision fast", function()
  local dirs = {}
  lazy_setup(function()
    for i, options in ipairs(FORMATS) do
      dirs[i] = os.tmpname()
      os.remove(dirs[i])
      local all = { source = DEMO, out = dirs[i] }
      for key, value in pairs(options) do all[key] = value end
      assert(moonlet.quantize(all))
    end
  end)
  lazy_teardown(function()
    for _, dir in ipairs(dirs) do checkpoint.remove(dir) end
  end)

  it("is near exact", function()
    for i, options in ipairs(FORMATS) do
      local exact <close> = assert(moonlet.open(dirs[i], { threads = 2, precision = "exact" }))
      local fast <close> = assert(moonlet.open(dirs[i], { threads = 2, precision = "fast" }))
      local r = assert(moonlet.eval.kld(fast, { reference = exact, text = TEXT }))
      local what = ("%s %s"):format(options.recipe, options.mode or options.bits or "")
      assert.is_true(r.mean > 0, what)
      assert.is_true(r.mean < LIMIT, ("%s: mean KLD %g"):format(what, r.mean))
    end
  end)

  it("is nearer where no matrix is quantized, also far into a text", function()
    local exact <close> = assert(moonlet.open(DEMO, { threads = 2, precision = "exact" }))
    local fast <close> = assert(moonlet.open(DEMO, { threads = 2, precision = "fast" }))
    for _, text in ipairs { TEXT, checkpoint.slurp("docs/api.md"):sub(1, 2000) } do
      local r = assert(moonlet.eval.kld(fast, { reference = exact, text = text, window = 2000 }))
      assert.is_true(r.mean > 0)
      assert.is_true(r.mean < BF16_LIMIT, ("mean KLD %g"):format(r.mean))
    end
  end)

  -- 300 tokens end in their second block of positions.
  it("gives the same bits however a prompt is cut, on any number of threads", function()
    local expected
    for threads = 1, 3, 2 do
      local texts <close> = assert(moonlet.open(dirs[1]))
      local ids = assert(texts:encode(checkpoint.slurp("docs/api.md")))
      ids = table.move(ids, 1, 300, 1, {})
      local model <close> = assert(core.model_open(dirs[1], { threads = threads, int8 = true }))
      for _, size in ipairs { #ids, 7, 130 } do
        local session <close> = assert(model:session { ctx = 1024, kv = "f16" })
        for first = 1, #ids, size do
          assert(session:eval { table.unpack(ids, first, math.min(first + size - 1, #ids)) })
        end
        local _, values = session:logits():topk(100)
        expected = expected or values
        assert.same(expected, values)
        if size == 130 then
          local snapshot <close> = assert(session:snapshot())
          assert(session:eval { 7 })
          local _, after = session:logits():topk(100)
          assert(session:eval(ids))
          assert(session:restore(snapshot))
          assert(session:eval { 7 })
          local _, again = session:logits():topk(100)
          assert.same(after, again)
        end
      end
    end
  end)

  -- Such experts read rows in bf16 and in 8 bits, which have to have room beside one another.
  it("has room for experts whose gate and up are of different kinds", function()
    local model <close> = assert(moonlet.open(DEMO, { threads = 2, precision = "fast" }))
    for i = 0, model:info().config.num_hidden_layers - 1 do
      assert(model:replace(("layers.%d.mlp.experts.up_proj"):format(i), { mode = "mxfp4" }))
    end
    local ids, expected = {}, nil
    for i = 1, 512 do ids[i] = i * 37 % 1000 end
    for _, size in ipairs { 64, 512 } do
      local session <close> = assert(model:session { ctx = 512 })
      for last = size, #ids, size do assert(session:sync(table.move(ids, 1, last, 1, {}))) end
      local _, values = session:logits():topk(100)
      expected = expected or values
      assert.same(expected, values)
    end
  end)

  it("gives the same bits on every instruction set", function()
    local script, out, seen = os.tmpname(), os.tmpname(), {}
    for _, dir in ipairs(dirs) do
      for _, variant in ipairs(core.kernels()) do
        checkpoint.spit(script, CHILD:format(package.path, package.cpath, dir, TEXT:sub(1, 180),
          out))
        local p = assert(io.popen(("MOONLET_CPU=%s lua5.4 %s 2>&1"):format(variant.level, script)))
        assert.equal(variant.name, p:read("a"))
        assert.is_true(p:close())
        local bytes = checkpoint.slurp(out)
        assert.is_true(#bytes > 100000)
        seen[dir] = seen[dir] or bytes
        assert.is_true(seen[dir] == bytes, variant.name .. ": other logits")
      end
    end
    os.remove(script)
    os.remove(out)
  end)
end)
