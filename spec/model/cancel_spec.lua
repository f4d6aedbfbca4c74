-- Batches that are cancelled at every place where they ask whether they are: nobody sees a part of
-- one. Looks are counted, so nothing depends on time.
local core = require "moonlet.core"

local MODELS <const> = { "dense-text", "moe-wrapped" }

local function ids_from(first, n)
  local ids = {}
  for i = 1, n do ids[i] = (first * 7 + i * 13) % 200 end
  return ids
end

local function values_of(ses)
  local ids, values = ses:logits():topk(200)
  return { ids, values }
end

-- Calls eval(look) with rising numbers until it is done; every time before, sessions have to be as
-- they were. Returns the last look that cancelled.
local function interrupt(sessions, eval)
  local before, n_past, look, last = {}, {}, 1, 0
  for i, ses in ipairs(sessions) do before[i], n_past[i] = values_of(ses), ses:n_past() end
  while true do
    local ok, _, code = eval(look)
    if ok then return last end
    assert.equal("cancelled", code)
    for i, ses in ipairs(sessions) do
      assert.equal(n_past[i], ses:n_past())
      assert.same(before[i], values_of(ses))
    end
    last = look
    look = look + 1 + look // 12
  end
end

for _, name in ipairs(MODELS) do
  for _, int8 in ipairs { false, true } do
    for threads = 1, 2 do
      local case = ("%s, %s, %d threads"):format(name, int8 and "fast" or "exact", threads)
      describe("a cancelled batch, " .. case, function()
        local model, n_layers
        before_each(function()
          model = assert(core.model_open("spec/golden/models/" .. name .. "/hf",
            { threads = threads, int8 = int8 }))
          n_layers = #model:info().config.layer_types
        end)
        after_each(function() model:close() end)

        local function open()
          local ses = assert(model:session { ctx = 64 })
          assert(ses:eval { 1, 2, 3 })
          return ses
        end

        it("leaves a session from which the same bits follow, wherever it ends", function()
          local ses <close> = open()
          local other <close> = open()
          local last = interrupt({ ses }, function(look) return ses:eval(ids_from(1, 40), look) end)
          assert.is_true(last > 10 * n_layers) -- it looks within layers
          assert(other:eval(ids_from(1, 40)))
          assert.same(values_of(other), values_of(ses))
        end)

        it("leaves all its sessions and sums so, and scores are filled in", function()
          local function parts(a, b)
            local first, second = { 1, 2, 3 }, { 1, 2, 3 }
            table.move(ids_from(1, 20), 1, 20, 4, first)
            table.move(ids_from(2, 30), 1, 30, 4, second)
            local top = model:scoring(first, { top = 2 })
            local mean = model:scoring(second, { mean = true })
            return { { session = a, ids = ids_from(1, 20), score = top },
              { session = b, ids = ids_from(2, 30), score = mean } }
          end
          local a <close> = open()
          local b <close> = open()
          local c <close> = open()
          local d <close> = open()
          local cut, whole = parts(a, b), parts(c, d)
          interrupt({ a, b }, function(look) return model:eval_parts(cut, look) end)
          assert(model:eval_parts(whole))
          assert.same(values_of(c), values_of(a))
          assert.same(values_of(d), values_of(b))
          assert.same(whole[2].score:mean(), cut[2].score:mean())
          for i = 5, 23 do
            assert.same(table.pack(whole[1].score:at(i)), table.pack(cut[1].score:at(i)))
          end
        end)
      end)
    end
  end
end
