local checkpoint = require "spec.support.checkpoint"
local mortal = require "spec.support.mortal"
local plan = require "moonlet.plan"
local recipe = require "moonlet.recipe"

---A description as moonlet.layout makes it; fields replaced by `changes`.
local function tensor(changes)
  local t = { name = "model.layers.3.self_attn.q_proj.weight", part = "text", class = "q_proj",
    shape = { 512, 256 }, rows = 512, cols = 256, layer = 3, n_layers = 4,
    kind = "full_attention", matrix = true }
  for k, v in pairs(changes or {}) do t[k] = v end
  return t
end

local function with_file(source, fn)
  local path = os.tmpname()
  local f = assert(io.open(path .. ".lua", "wb"))
  f:write(source)
  f:close()
  fn(path .. ".lua")
  os.remove(path .. ".lua")
  os.remove(path)
end

local function decide(source, t, options)
  local decision, message, code
  with_file(source, function(path)
    local loaded
    loaded, message, code = recipe.load(path, options)
    if loaded then decision, message, code = loaded:decide(t or tensor()) end
  end)
  return decision, message, code
end

-- A recipe file that answers `expression` for every tensor.
local function answering(expression)
  return ("return function(options, kit) return function(tensor) return %s end end")
    :format(expression)
end

describe("recipe", function()
  describe("decisions", function()
    it("fills in what the mode implies", function()
      assert.same({ mode = "affine", bits = 4, group = 64 },
        decide(answering '{ mode = "affine", bits = 4 }'))
      assert.same({ mode = "mxfp4", bits = 4, group = 32 }, decide(answering '{ mode = "mxfp4" }'))
      assert.same({ mode = "mxfp8", bits = 8, group = 32 }, decide(answering '{ mode = "mxfp8" }'))
      assert.same({ mode = "nvfp4", bits = 4, group = 16 }, decide(answering '{ mode = "nvfp4" }'))
      assert.same({ keep = "bf16" }, decide(answering '{ keep = "bf16" }'))
      assert.same({ keep = "f32" },
        decide(answering '{ keep = "bf16" }', tensor { stored = "f32", matrix = false }))
      assert.same({ drop = true },
        decide(answering "{ drop = true }", tensor { part = "mtp", class = "mtp" }))
    end)

    it("takes every width and group that MLX has, and no other", function()
      for bits = 1, 9 do
        for _, group in ipairs { 16, 32, 64, 128, 256 } do
          local d = decide(answering(('{ mode = "affine", bits = %d, group = %d }')
            :format(bits, group)))
          local exists = bits >= 2 and bits <= 8 and bits ~= 7 and group >= 32 and group <= 128
          assert.equal(exists, d ~= nil)
        end
      end
    end)

    it("names recipe and tensor when a decision is impossible", function()
      local cases = {
        ["nil"] = "decision %(table%) expected, got nil",
        ["{}"] = "exactly one of mode, keep and drop",
        ['{ keep = "bf16", mode = "mxfp4" }'] = "exactly one of mode, keep and drop",
        ['{ keep = "f16" }'] = '"bf16" and "stored" are known',
        ["{ drop = true }"] = "cannot do without it",
        ["{ bits = 4 }"] = "exactly one",
        ['{ keep = "bf16", bits = 4 }'] = "bits needs a mode",
        ['{ keep = "bf16", fit = "mse" }'] = "fit needs a mode",
        ['{ drop = true, gptq = true }'] = "gptq needs a mode",
        ['{ mode = "mxfp4", fit = "best of three" }'] = "%(mxfp4%): unknown fit best of three; "
          .. "there are: minmax mse imatrix qstream best",
        ['{ mode = "mxfp8", fit = "qstream" }'] = "qstream chooses among exponents of mxfp4",
        ['{ mode = "nvfp4", gptq = 1 }'] = "gptq: boolean expected, got number",
        ['{ mode = "affine" }'] = "%(affine%): bits are missing",
        ['{ mode = "affine", bits = 7, group = 32 }'] =
          "%[512, 256%]: %(affine, 7 bits, group 32%): affine has no 7%-bit form",
        ['{ mode = "affine", bits = "4" }'] = "bits: number expected, got string",
        ['{ mode = {}, bits = 4 }'] = "mode: string expected, got table",
        ['{ mode = "affine", bits = 0/0 }'] = "affine has no %-?nan%-bit form",
        ['{ mode = "mxfp4", group = 64 }'] = "mxfp4 has no group of 64",
        ['{ mode = "mxfp4", bits = 8 }'] = "mxfp4 has no 8%-bit form",
        ['{ mode = "q4_k", bits = 4 }'] =
          "unknown mode q4_k; there are: affine fp8 mxfp4 mxfp8 nvfp4",
        ['{ mode = "affine", bits = 4, groupsize = 64 }'] = "unknown field 'groupsize'",
        ['error("too hot")'] = "too hot",
        ["tensor.missing.field"] = "attempt to index a nil value",
      }
      for source, pattern in pairs(cases) do
        local d, message, code = decide(answering(source))
        assert.is_nil(d)
        assert.matches(pattern, message)
        assert.matches("q_proj%.weight", message)
        assert.matches("^recipe /tmp/", message)
        assert.is_true(code == "range" or code == "format")
      end
    end)

    it("refuses groups that rows do not divide into, and formats for vectors", function()
      local _, message = decide(answering '{ mode = "affine", bits = 4, group = 128 }',
        tensor { shape = { 8, 192 }, cols = 192 })
      assert.matches("%[8, 192%]: %(affine, 4 bits, group 128%): rows of 192 do not divide into "
        .. "groups of 128", message)
      _, message = decide(answering '{ mode = "mxfp4" }', tensor { matrix = false })
      assert.matches("only matrices", message)
    end)

    it("counts bytes with scales and biases", function()
      local t = tensor()
      local function bytes(d) return recipe.bytes(t, d) end
      assert.equal(512 * 256 * 2, bytes { keep = "bf16" })
      assert.equal(512 * 256 * 4, bytes { keep = "f32" })
      assert.equal(0, bytes { drop = true })
      assert.equal(512 * (256 * 3 // 8 + 4 * 2 * 2),
        bytes { mode = "affine", bits = 3, group = 64 })
      assert.equal(512 * (128 + 8), bytes { mode = "mxfp4", bits = 4, group = 32 })
      assert.equal(512 * (256 + 8), bytes { mode = "mxfp8", bits = 8, group = 32 })
      assert.equal(512 * (128 + 16), bytes { mode = "nvfp4", bits = 4, group = 16 })
    end)
  end)

  describe("files", function()
    it("see the tensor, their options and the kit, and nothing of the machine", function()
      assert.same({ mode = "affine", bits = 5, group = 32 }, decide([[
        return function(options, kit)
          assert(options.bits == 3 and options.mxfp == true)
          for _, name in ipairs { "io", "os", "debug", "package", "require", "load", "dofile",
              "loadfile", "pcall", "coroutine", "getmetatable", "setmetatable", "rawset", "print",
              "collectgarbage" } do
            assert(_ENV[name] == nil, name)
          end
          assert(math.random == nil and string.dump == nil)
          return function(t)
            assert(t.class == "q_proj" and t.layer == 3 and t.n_layers == 4 and t.cols == 256)
            assert(t.kind == "full_attention" and t.shape[1] == 512)
            return kit.affine(kit.snap(options.bits + 2), 32)
          end
        end]], nil, { bits = 3, mxfp = true }))
    end)

    it("cannot reach the caller's tables", function()
      local t = tensor()
      assert.truthy(decide([[return function(o, kit)
        string.format, table.insert = nil, nil
        return function(t) t.shape[1], t.name = 0, nil; return kit.keep() end
      end]], t))
      assert.same(tensor(), t)
      assert.is_function(string.format)
      assert.is_function(table.insert)
    end)

    it("are stopped when they run too long, at any stage", function()
      local loops = { "while true do end", "return function() while true do end end",
        "return function() return function() while true do end end end" }
      for _, source in ipairs(loops) do
        local d, message = decide(source)
        assert.is_nil(d)
        assert.matches("runs too long", message)
      end
      local function spin() while true do end end
      for _, own in ipairs { spin, function() coroutine.wrap(spin)() end } do
        local d, message = assert(recipe.load(own)):decide(tensor())
        assert.is_nil(d)
        assert.matches("runs too long", message)
      end
      assert.is_nil((debug.gethook()))
    end)

    it("must be text chunks that return a function of a function", function()
      local cases = {
        [string.dump(function() end)] = "attempt to load a binary chunk",
        ["return {"] = "unexpected symbol",
        ["return 4"] = "must return function%(options, kit%), returned number",
        ["return function() return {} end"] = "must return a function, returned table",
        ["x = y.z"] = "attempt to index a nil value",
        ["return function() return function() end, { mode = 'affine', bits = 7 } end"] =
          "base decision: %(affine, 7 bits%): affine has no 7%-bit form",
        ["return function() return function() end, nil, 4 end"] = "defaults: a table expected",
        ["return function() return function() end, nil, { fit = 'x' } end"] =
          "defaults: fit = x; there are: minmax mse imatrix qstream best",
        ["return function() return function() end, nil, { gptq = 1 } end"] =
          "defaults: gptq = 1; there are: true false",
        ["return function() return function() end, nil, { awq = true } end"] =
          "defaults: awq = true; there are: search mlx%-node off",
        ["return function() return function() end, nil, { damp = 1 } end"] =
          "defaults: unknown field 'damp'",
      }
      for source, pattern in pairs(cases) do
        local d, message, code = decide(source)
        assert.is_nil(d)
        assert.matches(pattern, message)
        assert.equal("format", code)
      end
    end)

    it("that do not exist are named", function()
      for _, name in ipairs { "no_such_recipe", "/no/such/file.lua", "no such name" } do
        local loaded, message, code = recipe.load(name)
        assert.is_nil(loaded)
        assert.matches(name, message, 1, true)
        assert.equal("io", code)
      end
    end)
  end)

  it("may give the decision that its options ask for", function()
    local function base(name, options) return assert(recipe.load(name, options)).base end
    assert.same({ mode = "affine", bits = 3, group = 64 }, base("unsloth"))
    assert.same({ mode = "affine", bits = 8, group = 128 },
      base("unsloth", { bits = 8, group = 128, mxfp = true }))
    assert.same({ mode = "nvfp4", bits = 4, group = 16 }, base("unsloth", { mode = "nvfp4" }))
    assert.same({ mode = "mxfp4", bits = 4, group = 32 }, base("uniform", { mode = "mxfp4" }))
    assert.is_nil(base("keep_bf16"))
  end)

  it("may say what it wants of the quantizer", function()
    assert.same({ fit = "qstream" }, assert(recipe.load("qstream_mxfp4")).defaults)
    assert.same({}, assert(recipe.load("unsloth")).defaults)
    assert.same({}, assert(recipe.load(function() end)).defaults)
    with_file([[return function() return function() end, nil,
      { fit = "best", gptq = false, awq = "mlx-node" } end]], function(path)
      assert.same({ fit = "best", gptq = false, awq = "mlx-node" },
        assert(recipe.load(path)).defaults)
    end)
    assert.same({ mode = "affine", bits = 3, group = 64, fit = "mse", gptq = true },
      decide(answering '{ mode = "affine", bits = 3, fit = "mse", gptq = true }'))
  end)

  it("takes a function as a recipe", function()
    local loaded = assert(recipe.load(function(t) return { mode = "affine", bits = t.layer } end))
    assert.same({ mode = "affine", bits = 3, group = 64 }, loaded:decide(tensor()))
    assert.equal(loaded, recipe.load(loaded))
  end)

  it("raises on misuse", function()
    assert.error_matches(function() recipe.load(4) end, "function expected")
    for _, value in ipairs { { {} }, { a = 1 }, print } do
      assert.error_matches(function() recipe.load("unsloth", { bits = value }) end,
        "option 'bits': boolean, number, text or a list of them expected")
    end
    assert.error_matches(function() recipe.load("unsloth", { 4 }) end, "have names")
    assert.error_matches(function() recipe.load("unsloth", 4) end, "option table expected")
    assert.error_matches(function()
      recipe.options_of { bits = 4, recipe_options = { bits = 5 } }
    end, "option 'bits' is given twice")
    assert.error_matches(function() recipe.load(function() end, { bits = 4 }) end, "no options")
  end)

  describe("options", function()
    it("reach the recipe as they are given", function()
      decide([[return function(o)
        assert(o.n == 4 and o.x == 0.5 and o.name == "a b" and o.on == false and #o.list == 2
          and o.list[1] == "x" and o.list[2] == 2 and o.none[1] == nil)
        error("reached", 0)
      end]], nil, { n = 4, x = 0.5, name = "a b", on = false, list = { "x", 2 }, none = {} })
    end)

    it("are for published recipes to accept", function()
      local cases = {
        config_i = { [{ bits = 4 }] = "no option 'bits'; it takes none" },
        mixed_3_6 = { [{ low = 4 }] = "no option 'low'; there are: group mxfp rule",
          [{ rule = "llama" }] = "rule must be one of mlx%-node mlx%-lm" },
        qwen3_5 = { [{ bits = 5 }] = "asks for 7 bits in attention %(a known trap",
          [{ bits = 6 }] = "asks for 7 bits in down_proj %(a known trap",
          [{ bits = 7 }] = "bits must be one of 2 3 4 8" },
        qstream_mxfp4 = { [{ exclude = "x" }] = "exclude must be a list of texts",
          [{ exclude = { 1 } }] = "exclude must be a list of texts" },
        keep_bf16 = { [{ mxfp = true }] = "it takes none" },
      }
      for name, given in pairs(cases) do
        for options, pattern in pairs(given) do
          local loaded, message, code = recipe.load(name, options)
          assert.is_nil(loaded)
          assert.matches("^recipe " .. name .. ": .*" .. pattern, message)
          assert.equal("format", code)
        end
      end
    end)
  end)

  it("lists what there is", function()
    local names = {}
    for _, r in ipairs(assert(recipe.list())) do
      names[r.name] = r.summary
      assert.matches("^%S.*%w", r.summary, nil, nil, r.name)
      -- budget carries out what was solved for it
      assert(recipe.load(r.name, r.name == "budget" and { choice = {} } or nil))
    end
    assert.matches("one format for every matrix", names.uniform)
    local _, message = recipe.load("unslot")
    assert.matches("no recipe named unslot, and no such file; there are: .*config_i .*unsloth",
      message)
  end)

  describe("kit", function()
    it("snaps, promotes and fits", function()
      local got
      with_file([[return function(_, kit)
        local widths = {}
        for b = 0, 12 do widths[b + 1] = kit.snap(b) end
        local modes = { [4] = "mxfp4", [8] = "mxfp8" }
        local promoted = {}
        for _, b in ipairs(kit.widths) do
          promoted[#promoted + 1] = kit.promote(kit.affine(b, 64), modes)
        end
        local kept = kit.promote(kit.keep(), modes)
        return function(t)
          error(table.concat(widths, " ") .. "|" .. promoted[3].mode .. promoted[3].group
            .. promoted[6].mode .. promoted[2].mode .. promoted[2].bits .. kept.keep .. "|"
            .. kit.fit(t, kit.affine(4, 128)).bits .. kit.fit(t, kit.affine(4, 96)).keep, 0)
        end
      end]], function(path)
        local _, message = assert(recipe.load(path)):decide(tensor())
        got = message:match("weight: (.*)$")
      end)
      assert.equal("2 2 2 3 4 5 6 8 8 8 8 8 8|mxfp432mxfp8affine3bf16|4bf16", got)
    end)
  end)

  describe("kit", function()
    local function with_kit(body) return ("return function(options, kit) %s end"):format(body) end

    it("finds patterns in names", function()
      local cases = {
        { "*shared_expert*", "mlp.shared_expert_gate.weight", true },
        { "*.mlp.gate.", "layers.0.mlp.gate.weight", true },
        { "*.mlp.gate.", "layers.0.mlp.gate_proj.weight", false },
        { "layers.*.q_proj", "model.layers.11.self_attn.q_proj.weight", true },
        { "q_proj*layers", "model.layers.11.self_attn.q_proj.weight", false },
        { "a.c", "abc", false }, { "ab*b", "ab", false }, { "ab*ab", "abab", true },
        { "*", "x", true }, { "", "x", true }, { "%a", "x", false },
      }
      for _, case in ipairs(cases) do
        local _, message = decide(with_kit(("error(tostring(kit.glob(%q, %q)), 0)"):format(case[1],
          case[2])))
        assert.matches(": " .. tostring(case[3]) .. "$", message, nil, nil, case[1])
      end
    end)

    it("makes recipes of published ones", function()
      local source = with_kit([[
        local decide, base, defaults = kit.recipe("unsloth", { bits = options.bits })
        assert(base.bits == options.bits and defaults == nil)
        return function(tensor)
          if tensor.class == "o_proj" then return kit.affine(8, 64) end
          return decide(tensor)
        end]])
      assert.same({ mode = "affine", bits = 6, group = 64 }, decide(source, nil, { bits = 4 }))
      assert.same({ mode = "affine", bits = 8, group = 64 },
        decide(source, tensor { class = "o_proj" }, { bits = 4 }))
      local _, message = decide(source, nil, { bits = 7 })
      assert.matches("%.lua: bits must be one of", message)
      _, message = decide(with_kit 'return kit.recipe("unslot")')
      assert.matches("%.lua: kit%.recipe: no published recipe named unslot", message)
    end)

    it("asks what checks at the end find", function()
      with_file(with_kit([[
        local n = 0
        kit.at_end(function() kit.expect(n == 1, n .. " tensors of the kind"); n = 0 end)
        return function(t)
          if t.class == "q_proj" then n = n + 1 end
          return kit.keep()
        end]]), function(path)
        local rule = assert(recipe.load(path))
        for _ = 1, 2 do
          rule:decide(tensor())
          assert.is_true(rule:finish())
        end
        local ok, message, code = rule:finish()
        assert.is_nil(ok)
        assert.equal(("recipe %s: 0 tensors of the kind"):format(path), message)
        assert.equal("range", code)
      end)
    end)
  end)

  describe("qstream_mxfp4", function()
    local MOE = "spec/golden/configs/qwen3.6-35b-a3b.json"
    local function exclude(...) return plan("qstream_mxfp4", MOE, { exclude = { ... } }) end

    it("refuses an exclude that occurs in no name", function()
      local p, message = exclude("*lm_head*", "*layers.40.*")
      assert.is_nil(p)
      assert.equal("recipe qstream_mxfp4: exclude: '*layers.40.*' occurs in no tensor's name",
        message)
      p = assert(exclude("*lm_head*", "layers.39."))
      local kept = {}
      for _, t in ipairs(p.tensors) do
        if t.class ~= "vision" and t.class ~= "mtp" and t.decision.keep then
          kept[t.class] = (kept[t.class] or 0) + 1
        end
      end
      assert.same({ 1, 1, nil, 1, 1, 60 }, { kept.lm_head, kept.expert_up, kept.embed,
        kept.q_proj, kept.router, kept.decay })
    end)
  end)

  describe("unsloth", function()
    it("refuses what it was not made for", function()
      local cases = {
        [{ bits = 7 }] = "bits must be one of 2 3 4 5 6 8", [{ bits = 1 }] = "bits must be one of",
        [{ bits = 4.5 }] = "bits must be one of", [{ bits = "4" }] = "bits must be one of",
        [{ bits = { 4 } }] = "bits must be one of", [{ mxfp = 1 }] = "mxfp must be true or false",
        [{ bit = 4 }] = "no option 'bit'; there are: bits era group mode mxfp",
        [{ group = 48 }] = "group must be", [{ mode = "mxfp4" }] = "mode must be one of affine",
        [{ mode = "nvfp4", bits = 3 }] = "bits must be 4$",
        [{ mode = "nvfp4", group = 64 }] = "group must be 16$",
        [{ mode = "nvfp4", mxfp = true }] = "mxfp goes with mode affine",
      }
      for options, pattern in pairs(cases) do
        local loaded, message, code = recipe.load("unsloth", options)
        assert.is_nil(loaded)
        assert.matches("^recipe unsloth: " .. pattern, message)
        assert.equal("format", code)
      end
    end)

    it("leaves alone what its groups do not divide", function()
      local rule = assert(recipe.load("unsloth", { bits = 4, group = 128 }))
      assert.same({ keep = "bf16" }, rule:decide(tensor { shape = { 8, 192 }, cols = 192 }))
      assert.same({ mode = "affine", bits = 6, group = 128 }, rule:decide(tensor()))
    end)
  end)

  it("may begin as files of Lua may", function()
    for _, first in ipairs { "\xEF\xBB\xBF", "#!/usr/bin/env lua\n", "\xEF\xBB\xBF# mine\n" } do
      assert.same({ keep = "bf16" }, decide(first .. answering "kit.keep()"))
    end
    assert.matches("%.lua:3: ", select(2, decide("#!/bin/lua\n\n" .. answering "nil + 1")))
  end)

  it("is told which argument of the kit's functions is wrong", function()
    for call, said in pairs {
      ["kit.fit(tensor)"] = "kit%.fit: argument 2: a decision expected, got nil",
      ["kit.fit(nil, kit.keep())"] = "kit%.fit: argument 1: a tensor expected, got nil",
      ["kit.fit(tensor, { mode = 'q4' })"] = "kit%.fit: argument 2: a decision expected, got a",
      ["kit.snap '4'"] = "kit%.snap: argument 1: a number expected, got 4",
      ["kit.promote(3, {})"] = "kit%.promote: argument 1: a decision expected, got 3",
      ["kit.promote(kit.affine(4), { [4] = 'q4' })"] = "kit%.promote: argument 2: a table of modes",
      ["kit.error(kit.affine(7))"] = "kit%.error: argument 1: a decision expected",
      ["kit.damage(tensor)"] = "kit%.damage: argument 2: a decision expected, got nil",
      ["kit.candidates()"] = "kit%.candidates: argument 1: a tensor expected, got nil",
      ["kit.contains(1, 2)"] = "kit%.contains: argument 1: a list expected, got 1",
      ["kit.options(nil, {})"] = "kit%.options: argument 1: a table of options expected, got nil",
      ["kit.glob 'x'"] = "kit%.glob: argument 2: a text expected, got nil",
      ["kit.at_end(1)"] = "kit%.at_end: argument 1: a function expected, got 1",
    } do
      assert.matches("%.lua:1: " .. said, select(2, decide(answering(("(%s)"):format(call)))), call)
    end
  end)

  it("is no pipe that nobody writes into, nor is what tells of it", function()
    local dir = checkpoint.directory()
    finally(function() os.execute("rm -r " .. dir) end)
    os.execute(("cd %s && mkfifo a.lua moonlet.json"):format(dir))
    -- in a process of its own, to which there is an end should it wait
    assert.equal(("nil\trecipe %s/a.lua: not a regular file\tio\n"
      .. "nil\t%s/moonlet.json: not a regular file\tio\n%s\n"):format(dir, dir,
      dir:match("[^/]+$")), mortal.run(([[
        local dir = %q
        print(require "moonlet.recipe".load(dir .. "/a.lua"))
        print(require "moonlet.json".read(dir .. "/moonlet.json"))
        print(require "moonlet.eval.label".checkpoint(dir))]]):format(dir), { ms = 60000 }))
  end)
end)
