-- Calibrations that are killed, and others that go on with them.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local moonlet = require "moonlet"
local mortal = require "spec.support.mortal"

local DEMO <const> = "examples/demo-model"
local TEXT <const> = ("Call me Ishmael. Some years ago, never mind how long. "):rep(6)

-- A run in a process of its own, of three chunks; `before` runs first.
local CHILD = [[
local calibrate = require "moonlet.calibrate"
calibrate.NOTE_SECONDS = 0
local o = { model = %q, text = %q, chunk = 24, chunks = 3, hessian_cols = 300, threads = 2,
  out = %q, hessians = %q, resume = true }
%s
local result, message = calibrate.run(o)
print(result and table.concat({ "done", result.matrices, result.tokens, result.chunks,
  result.never_met, result.hessians, #result.notes }, " ") or message)
]]

-- Everything that changes the disk, and every fourth border between layers, is a tick.
local TICKS <const> = [[
for _, key in ipairs { "make_dir", "journal_create", "imatrix_write", "sync_dir" } do
  ticking(core, key)
end
ticking(os, "rename")
ticking(os, "remove")
local open = core.model_open
core.model_open = function(...)
  local model = open(...)
  local methods = debug.getmetatable(model).__index
  local begin = methods.calibrate
  methods.calibrate = function(...)
    tick()
    local calibration, message, code = begin(...)
    if not calibration then return nil, message, code end
    local its = debug.getmetatable(calibration).__index
    local keep = its.keep
    its.keep = function(...)
      local layers, kept = keep(...)
      if layers % 4 == 0 then tick() end
      return layers, kept
    end
    ticking(its, "finish")
    return calibration
  end
  return model
end
]]

describe("a calibration", function()
  local dir, out, hessians, whole, said_whole

  local function child(before, opts)
    return mortal.run(CHILD:format(DEMO, TEXT, out, hessians, before or ""), opts)
  end

  setup(function()
    dir = mortal.directory()
    out, hessians = dir .. "/i.gguf", dir .. "/h.safetensors"
    said_whole = child()
    assert.matches("^done 103 72 3 %d+ %d+ 1\n$", said_whole)
    whole = mortal.contents(dir)
    assert.is_truthy(whole["i.gguf"] and whole["h.safetensors"])
  end)
  teardown(function() os.execute("rm -r " .. dir) end)
  before_each(function() os.execute(("rm -r %s && mkdir %s"):format(dir, dir)) end)

  local function is_whole(said)
    assert.equal(said_whole, said)
    assert.same(whole, mortal.contents(dir))
  end

  it("gives the same bytes wherever the first run was killed", function()
    local n = 0
    local said
    repeat
      n = n + 1
      said = child(TICKS, { tick = n })
      if said ~= said_whole then
        assert.equal("", said)
        said = child()
      else
        n = -n
      end
      is_whole(said)
      os.execute(("rm %s %s"):format(out, hessians))
    until n < 0
    assert.is_true(n < -20, tostring(n))
  end)

  it("gives the same bytes after many deaths, and does no layer twice", function()
    local log, rounds = os.tmpname(), 0
    local said
    finally(function() os.remove(log) end)
    repeat
      rounds = rounds + 1
      said = child(([[
        local n, log = 0, io.open(%q, "a")
        o.on_progress = function(done)
          log:write(("%%.3f\n"):format(done))
          log:flush()
          n = n + 1
          if n == 8 then die() end
        end]]):format(log))
    until said ~= "" or rounds > 20
    is_whole(said)
    assert.equal(4, rounds)
    -- Each of the three that died had done two layers and two chunks of the next one.
    local steps = 0
    for _ in io.lines(log) do steps = steps + 1 end
    assert.equal(8 * 3 + 3 * 2, steps)
  end)

  -- Kills a run in the third layer.
  local function cut_off(before)
    assert.equal("", child((before or "") .. [[
      local n = 0
      o.on_progress = function() n = n + 1 if n == 8 then die() end end]]))
    assert.same({ ["i.gguf.partial"] = "directory", ["h.safetensors.partial"] = "directory" },
      mortal.contents(dir))
  end

  local function refused(before, pattern)
    local held = mortal.contents(out .. ".partial")
    assert.matches(pattern, child(before))
    assert.same(held, mortal.contents(out .. ".partial"))
  end

  it("has to be asked to go on", function()
    cut_off()
    refused("o.resume = nil", "i%.gguf%.partial: left by a run that was cut off; resume it %(%-%-")
    refused("o.resume, o.out = nil, nil", "h%.safetensors%.partial: left by a run that was cut off")
    is_whole(child())
  end)

  it("is not gone on with by one of another model, other texts or options", function()
    cut_off()
    refused("o.chunks = 2", "i%.gguf%.partial: begun with another choice of texts")
    refused("o.hessian_cols = 299", "begun with another choice of options")
    refused("o.hessians = nil", "begun with another file of Hessians")
    refused("o.out = nil", "h%.safetensors%.partial: begun with another imatrix")
    local other = dir .. "/model"
    os.execute(("cp -r %s %s && touch -d 2001-01-01 %s/*.safetensors"):format(DEMO, other, other))
    refused(("o.model = %q"):format(other), "begun with another model")
    os.execute("rm -r " .. other)
    is_whole(child("o.threads = 1"))
  end)

  it("says what the first run was told about model and texts", function()
    cut_off("o.model = './' .. o.model")
    assert.equal(said_whole, child())
    local file <close> = assert(moonlet.safetensors.open(hessians))
    assert.equal("./" .. DEMO, file:metadata("model"))
  end)

  it("goes on with either output alone", function()
    for _, other in ipairs { "out", "hessians" } do
      local without = ("o.%s = nil\n"):format(other)
      assert.equal("", child(without .. [[
        local n = 0
        o.on_progress = function() n = n + 1 if n == 8 then die() end end]]))
      local first
      local result = assert(moonlet.imatrix { model = DEMO, text = TEXT, chunk = 24, chunks = 3,
        hessian_cols = 300, resume = true, out = other == "hessians" and out or nil,
        hessians = other == "out" and hessians or nil,
        on_progress = function(done) first = first or done end })
      assert.equal(72, result.tokens)
      assert.is_true(first > 18, tostring(first))
      local name = other == "out" and "h.safetensors" or "i.gguf"
      assert.same({ [name] = whole[name] }, mortal.contents(dir))
      os.execute(("rm -f %s %s"):format(out, hessians))
    end
  end)

  it("lets one run write an output at a time, and says so at once", function()
    local said = {}
    assert(moonlet.imatrix { model = DEMO, text = TEXT, chunk = 24, chunks = 3,
      hessian_cols = 300, out = out, hessians = hessians, on_progress = function()
        if #said > 0 then return end
        said[1] = child()
        said[2] = child("o.resume, o.hessians = nil, nil")
        said[3] = child(("o.out = %q"):format(dir .. "/other.gguf"))
      end })
    for i, name in ipairs { "i%.gguf", "i%.gguf", "h%.safetensors" } do
      assert.matches(name .. "%.partial: another run is writing it\n$", said[i])
    end
    assert.same(whole, mortal.contents(dir))
  end)

  it("never removes what others have under the name of its place", function()
    checkpoint.spit(out .. ".partial", "mine")
    assert.matches("i%.gguf%.partial: exists, and no run can go on with it", child())
    assert.equal("mine", checkpoint.slurp(out .. ".partial"))
    os.execute(("rm %s.partial; mkdir %s.partial"):format(out, out))
    checkpoint.spit(out .. ".partial/notes", "mine")
    assert.matches("exists, and no run can go on with it .*journal.*; remove it", child())
    assert.equal("mine", checkpoint.slurp(out .. ".partial/notes"))
  end)

  it("is left to be gone on with by a stop, an interrupt and an error of a callback", function()
    for _, stop in ipairs { "return false", "io.popen('kill -INT $PPID'):close()",
        "error('no more')" } do
      local said = child(([[
        core.catch_interrupt()
        local n = 0
        o.on_progress = function() n = n + 1 if n == 8 then %s end end]]):format(stop))
      if not stop:find("error") then
        assert.matches("; .*/i%.gguf%.partial holds what is done, to be resumed %(%-%-resume%)\n$",
          said)
      end
      assert.same({ ["i.gguf.partial"] = "directory", ["h.safetensors.partial"] = "directory" },
        mortal.contents(dir))
      is_whole(child())
      os.execute(("rm %s %s"):format(out, hessians))
    end
  end)

  it("keeps the layer behind which it is stopped, however short the time since the last", function()
    assert.matches("^stopped; ", child([[
      calibrate.NOTE_SECONDS = 1000
      local n = 0
      o.on_progress = function() n = n + 1 return n < 6 end]]))
    local first
    assert(moonlet.imatrix { model = DEMO, text = TEXT, chunk = 24, chunks = 3,
      hessian_cols = 300, out = out, hessians = hessians, resume = true,
      on_progress = function(done) first = first or done end })
    assert.equal((2 * 72 + 24) / 8, first)
    assert.same(whole, mortal.contents(dir))
  end)

  it("is not gone on with where a part of it is missing or damaged", function()
    local function refuses(change, pattern)
      os.execute(("rm -rf %s/*"):format(dir))
      cut_off()
      os.execute(("cd %s && %s"):format(dir, change))
      local said = child()
      assert.matches(pattern .. ".*; [^;]*/i%.gguf%.partial cannot be gone on with; remove it\n$",
        said)
      assert.not_matches("%-%-resume", said)
      assert.is_truthy(core.list_dir(out .. ".partial").journal)
    end
    refuses("rm i.gguf.partial/stream-0", "stream%-0: is missing")
    refuses("truncate -s 10 i.gguf.partial/sums", "sums: ")
    refuses("rm -r h.safetensors.partial; echo old >h.safetensors", "h.*%.partial: is missing")
    assert.equal("old\n", checkpoint.slurp(hessians))
    refuses("rm h.safetensors.partial/hessians*", "hessians%.safetensors: is missing")
    for _, line in ipairs { 'border {"layers": 99, "stream": 0}', "border", "stream 1.5" } do
      os.execute(("rm -rf %s/*"):format(dir))
      cut_off()
      os.execute(("echo '%s' >>%s.partial/journal"):format(line, out))
      assert.matches("^%S+/i%.gguf%.partial/journal: line %d+ is damaged: it cannot be gone on "
        .. "with; remove %S+\n$", child())
    end
  end)

  it("does not take older Hessians for its own", function()
    assert.equal("", child "core.imatrix_write = die")
    os.execute(("rm -r %s.partial && echo old >%s"):format(hessians, hessians))
    assert.matches("h%.safetensors%.partial: is missing; .* cannot be gone on with", child())
    assert.equal("old\n", checkpoint.slurp(hessians))
  end)

  it("is left by a disk that is full at its end, which had reserved the imatrix's space", function()
    local said = child [[
      core.imatrix_write = function() return nil, "no space", "io" end
      o.on_progress = function()
        local bytes = core.file_info(o.out .. ".partial/imatrix.reserved")
        assert(bytes > 100000, bytes)
      end]]
    assert.matches("^no space; .*i%.gguf%.partial holds what is done, to be resumed", said)
    is_whole(child())
  end)

  it("keeps Hessians that cannot get their name", function()
    local said = child [[
      o.on_progress = function() core.make_dir(o.hessians .. ".partial/hessians.safetensors") end]]
    assert.matches("cannot replace: Is a directory; .*holds what is done, to be resumed", said)
    assert(os.remove(hessians .. ".partial/hessians.safetensors"))
    is_whole(child())
  end)

  it("changes no journal of others, and removes no file of theirs", function()
    os.execute(("mkdir %s.partial"):format(out))
    for _, text in ipairs { "mine", "mine\n", "mine\nand yours", "5\n", "" } do
      checkpoint.spit(out .. ".partial/journal", text)
      checkpoint.spit(out .. ".partial/notes", "mine")
      for _, resume in ipairs { "", "o.resume = nil" } do
        assert.matches("i%.gguf%.partial: [^\n]*remove it\n$", child(resume))
        assert.equal(text, checkpoint.slurp(out .. ".partial/journal"))
        assert.equal("mine", checkpoint.slurp(out .. ".partial/notes"))
      end
    end
    os.execute(("rm -r %s.partial"):format(out))
    cut_off()
    checkpoint.spit(out .. ".partial/notes", "mine")
    assert.equal(said_whole, child())
    assert.equal("mine", checkpoint.slurp(out .. ".partial/notes"))
  end)

  it("leaves nothing where nothing is done", function()
    assert.equal("stopped\n", child("o.on_progress = function() return false end"))
    assert.same({}, mortal.contents(dir))
  end)

  it("asks for the space of the imatrix before it runs", function()
    local free_bytes = core.free_bytes
    finally(function() core.free_bytes = free_bytes end)
    core.free_bytes = function() return 100 end
    local result, message, code = moonlet.imatrix { model = DEMO, text = TEXT, out = out,
      on_progress = function() error("it ran") end }
    assert.same({ nil, "io" }, { result, code })
    assert.matches("i%.gguf: needs [%d.]+ KiB, 100 B are free", message)
    assert.same({}, mortal.contents(dir))
  end)
end)
