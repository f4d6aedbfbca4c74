-- Runs of the quantizer that are killed, and others that go on with them.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local journals = require "spec.support.journal"
local json = require "moonlet.json"
local mortal = require "spec.support.mortal"
local quantize = require "moonlet.quantize"

local SOURCE = "spec/golden/models/moe-wrapped/hf"

-- A run in a process of its own: `out` from `source` by `recipe`. `before` runs first.
local CHILD = [[
local quantize = require "moonlet.quantize"
require("moonlet.quantize.run").NOTE_SECONDS = 0
local o = { source = %q, out = %q, recipe = "unsloth", bits = 4, shard_bytes = 150000,
  resume = true, threads = 2, command = "moonlet" }
%s
print(select(2, quantize(o)) or "done")
]]

local function child(out, before, opts)
  return mortal.run(CHILD:format(SOURCE, out, before or ""), opts)
end

local contents = mortal.contents

describe("resume", function()
  local dir, out, whole

  setup(function()
    dir = mortal.directory()
    assert.equal("done\n", child(dir .. "/whole"))
    whole = contents(dir .. "/whole")
    local files = 0
    for name in pairs(whole) do files = files + (name:find("safetensors$") and 1 or 0) end
    assert.is_true(files >= 3)
  end)
  teardown(function() os.execute("rm -r " .. dir) end)
  before_each(function() out = dir .. "/out" end)
  after_each(function() os.execute(("rm -rf %s %s.partial"):format(out, out)) end)

  local function is_whole()
    assert.same(whole, contents(out))
    assert.is_nil(core.list_dir(out .. ".partial"))
  end

  it("gives the same bytes wherever the first run was killed", function()
    -- Everything that changes the disk, numbered; the child dies just before number n.
    local count = [[
      for _, key in ipairs { "make_dir", "journal_create", "file_write", "sync_dir" } do
        ticking(core, key)
      end
      ticking(os, "rename")
      ticking(os, "remove")
      local tensors = 0
      o.on_progress = function()
        tensors = tensors + 1
        if tensors % 13 == 0 then tick() end
      end]]
    local n = 0
    local said
    repeat
      n = n + 1
      said = child(out, count, { tick = n })
      if said ~= "done\n" then
        assert.equal("", said)
        assert.equal("done\n", child(out))
      end
      is_whole()
      os.execute("rm -r " .. out)
    until said == "done\n"
    assert.is_true(n > 15, tostring(n))
  end)

  it("gives the same bytes after many deaths, and does nothing twice", function()
    local log = dir .. "/log"
    local rounds = 0
    repeat
      rounds = rounds + 1
      local said = child(out, ([[
        local n, log = 0, io.open(%q, "a")
        o.on_progress = function(done, total, name)
          log:write(name, "\n")
          log:flush()
          n = n + 1
          if n > 9 then die() end
        end]]):format(log))
    until said == "done\n" or rounds > 20
    is_whole()
    assert.is_true(rounds > 4)
    local seen, twice = {}, 0
    for name in io.lines(log) do
      if seen[name] and name ~= "" then twice = twice + 1 end
      seen[name] = true
    end
    assert.equal(0, twice)
  end)

  it("gives the same bytes when killed in the middle of a tensor", function()
    for ms = 10, 70, 10 do
      child(out, nil, { ms = ms })
      local held = core.list_dir(out)
      if not held or held.journal then assert.equal("done\n", child(out)) end
      is_whole()
      os.execute("rm -r " .. out)
    end
  end)

  it("begins where there is nothing to go on with", function()
    assert.equal("done\n", child(out))
    is_whole()
  end)

  it("says that there is nothing to go on with, once it is complete", function()
    child(out)
    assert.matches("/out: holds a complete checkpoint already\n$", child(out))
    assert.matches("/out: holds a complete checkpoint already\n$", child(out, "o.resume = nil"))
    is_whole()
  end)

  -- A partial directory with a few tensors in it.
  local function cut_off(before)
    child(out, (before or "") .. [[
      local n = 0
      o.on_progress = function() n = n + 1 if n > 9 then die() end end]])
    assert.is_truthy(core.list_dir(out .. ".partial"))
  end

  local function refused(before, pattern)
    local held = contents(out .. ".partial")
    assert.matches(pattern, child(out, before))
    assert.same(held, contents(out .. ".partial"))
  end

  it("has to be asked for", function()
    cut_off()
    refused("o.resume = nil",
      "out%.partial: left by a run that was cut off; resume it %(%-%-resume%)")
  end)

  it("refuses another plan and says what differs", function()
    cut_off()
    refused("o.bits = 5", "out%.partial: begun with another plan")
    refused("o.shard_bytes = 200000", "begun with another choice of options")
    refused("o.flavour = 'cpu'", "begun with another choice of options")
    refused("o.recipe, o.bits = 'keep_bf16', nil", "begun with another recipe")
    refused("o.source = 'spec/golden/models/moe-text/hf'", "begun with another source")
    assert.equal("done\n", child(out, "o.threads = 1 o.command = 'other'"))
    is_whole()
    os.execute("rm -r " .. out)
    cut_off()
    journals.edit(out .. ".partial/journal", function(line)
      return (line:gsub('"0%.1%.0"', '"0.0.9"', 1))
    end)
    refused("", "begun with another version of moonlet")
  end)

  it("notices that the source was written again", function()
    local source = dir .. "/source"
    os.execute(("cp -r %s %s"):format(SOURCE, source))
    cut_off(("o.source = %q"):format(source))
    os.execute(("touch -d 2001-01-01 %s/model*.safetensors"):format(source))
    refused(("o.source = %q"):format(source), "begun with another source")
  end)

  it("notices files that have lost bytes", function()
    cut_off("o.shard_bytes = 1 << 30")
    local file = out .. ".partial/model.safetensors.partial"
    os.execute(("cp %s %s/held && truncate -s -1 %s"):format(file, dir, file))
    for _, rehearse in ipairs { "", "o.dry_run = true" } do
      refused("o.shard_bytes = 1 << 30 " .. rehearse, "^%S+/model%.safetensors%.partial: "
        .. ".* %(it has not the bytes that it was left with%); %S+/out%.partial cannot be gone on "
        .. "with; remove it\n$")
    end
    os.execute(("mv %s/held %s"):format(dir, file))
    assert.equal("done\n", child(out, "o.shard_bytes = 1 << 30"))
    os.execute("rm -r " .. out)
    child(out, "o.on_progress = function(n, all) if n > all / 2 then die() end end")
    local first = ("%s.partial/model-00001-of-00004.safetensors"):format(out)
    assert.equal("file", core.file_kind(first))
    os.execute("truncate -s -1 " .. first)
    refused("", "has not the bytes that it was left with")
  end)

  it("has no fewer than no bytes to write", function()
    child(out, "core.file_write = function() die() end")
    local p = assert(quantize { source = SOURCE, out = out, recipe = "unsloth", bits = 4,
      shard_bytes = 150000, resume = true, dry_run = true })
    assert.is_true(p.dry_run.needed_bytes >= 0)
  end)

  it("refuses a directory of anything else", function()
    assert(core.make_dir(out .. ".partial"))
    for _, rehearse in ipairs { "", " o.dry_run = true" } do
      refused("o.resume = nil" .. rehearse,
        "^%S+/out%.partial: exists, left by a run that died or of another origin; remove it\n$")
    end
    assert(os.remove(out .. ".partial"))
    assert(core.make_dir(out .. ".partial"))
    checkpoint.spit(out .. ".partial/notes.txt", "mine")
    refused("", "out%.partial: exists, and no run can go on with it .*journal.*; remove it")
    checkpoint.spit(out .. ".partial/journal", "gibberish\n")
    refused("", "out%.partial: exists, and no run can go on with it .*of another origin%); remove")
    os.execute(("mv %s.partial %s/other && ln -s nowhere %s.partial"):format(out, dir, out))
    assert.matches("it is a link", child(out))
    assert.matches("it is a link", child(out, "o.resume = nil o.dry_run = true"))
    os.execute(("ln -snf other %s.partial"):format(out))
    refused("", "out%.partial: exists, and no run can go on with it %(it is a link%); remove it")
  end)

  it("refuses a journal with a line that is not as it was written", function()
    cut_off()
    local journal = out .. ".partial/journal"
    local text = checkpoint.slurp(journal)
    local lines = select(2, text:gsub("\n", ""))
    local function is_refused(damaged, line)
      checkpoint.spit(journal, damaged)
      refused("", line == 1 and "its journal is damaged or of another origin%); remove it\n$"
        or ("out%%.partial/journal: line %d is damaged: it cannot be gone on with; remove %%S+\n$")
          :format(line))
    end
    assert.is_true(lines > 3)
    is_refused(text .. "model-00001-of-00004.safetensors 9999\n", lines + 1)
    is_refused(text .. "awq [1]\n", lines + 1)
    is_refused(text:gsub("(safetensors )%d+\n$", "%17\n"), lines)
    is_refused(text:gsub("\n[^\n]*\n", "\n", 1), 2)
    is_refused(text:gsub("plan", "plam", 1), 1)
    checkpoint.spit(journal, text)
    assert.equal("done\n", child(out))
    is_whole()
  end)

  it("lets one run write at a time", function()
    local o = { source = SOURCE, out = out, recipe = "unsloth", bits = 4, shard_bytes = 150000 }
    local said = {}
    o.on_progress = function()
      if #said == 0 then
        said[1] = child(out)
        said[2] = child(out, "o.resume = nil")
      end
    end
    assert(quantize(o))
    assert.matches("out%.partial: another run is writing it", said[1])
    assert.matches("out%.partial: another run is writing it", said[2])
  end)

  it("does no work where another run has finished meanwhile", function()
    local finish = ("cp -r %s/whole %s"):format(dir, out)
    assert.matches("^%S+/out: holds a complete checkpoint already\n$", child(out, ([[
      local make_dir = core.make_dir
      core.make_dir = function(path)
        os.execute(%q)
        return make_dir(path)
      end
      o.on_progress = function() error("works") end]]):format(finish)))
    assert.is_nil(core.list_dir(out .. ".partial"))
    is_whole()
  end)

  it("goes on after a stop, an interrupt and an error of a callback", function()
    for _, stop in ipairs { "return false", "io.popen('kill -INT $PPID'):close()",
        "error('no more')" } do
      local said = child(out, ([[
        core.catch_interrupt()
        require("moonlet.quantize.run").NOTE_SECONDS = 1000
        local n = 0
        o.on_progress = function() n = n + 1 if n == 30 then %s end end]]):format(stop))
      if not stop:find("error") then
        assert.matches("; .*/out%.partial holds what is done, to be resumed %(%-%-resume%)\n$",
          said)
      end
      local first = nil
      assert(quantize { source = SOURCE, out = out, recipe = "unsloth", bits = 4,
        shard_bytes = 150000, resume = true, on_progress = function(done, total)
          first = first or done / total
        end })
      assert.is_true(first > 0.1, stop)
      os.execute("rm -r " .. out)
    end
  end)

  it("goes on after a disk was full, and where OUT had been taken at the end", function()
    for fault, words in pairs {
      ["core.file_write = function() return nil, 'no space', 'io' end"] = "^no space",
      ["o.on_progress = function() core.make_dir(o.out) core.make_dir(o.out .. '/x') end"] =
        "^%S+/out: Directory not empty",
    } do
      assert.matches(words .. "; %S+/out%.partial holds what is done, to be resumed %(%-%-resume%)"
        .. "\n$", child(out, fault))
      os.execute("rm -rf " .. out)
      assert.equal("1.0\ndone\n", child(out, [[
        local first
        o.on_progress = function(done, total)
          if not first then print(done / total) end
          first = true
        end]]))
      is_whole()
      os.execute("rm -r " .. out)
    end
  end)

  it("leaves files of others where a failure takes its own", function()
    assert.equal("no number\n", child(out, [[
      core.file_write = function() return nil, "no number", "format" end
      o.on_progress = function()
        local file <close> = io.open(o.out .. ".partial/notes.md", "w")
        file:write("mine")
      end]]))
    assert.same({ ["notes.md"] = true }, core.list_dir(out .. ".partial"))
    assert.equal("mine", checkpoint.slurp(out .. ".partial/notes.md"))
  end)

  it("can be rehearsed", function()
    cut_off()
    local held = contents(out .. ".partial")
    local o = { source = SOURCE, out = out, recipe = "unsloth", bits = 4, shard_bytes = 150000,
      resume = true, dry_run = true }
    local p = assert(quantize(o))
    assert.same(held, contents(out .. ".partial"))
    o.out = dir .. "/new"
    assert.is_true(p.dry_run.needed_bytes < assert(quantize(o)).dry_run.needed_bytes - 140000)
    o.out, o.resume = out, nil
    assert.matches("left by a run that was cut off", select(2, quantize(o)))
    assert.equal("done\n", child(out))
    is_whole()
  end)

  it("asks for the space that is missing only", function()
    cut_off()
    local free_bytes = core.free_bytes
    finally(function() core.free_bytes = free_bytes end)
    core.free_bytes = function() return 100 end
    local o = { source = SOURCE, out = out, recipe = "unsloth", bits = 4, shard_bytes = 150000,
      resume = true }
    local ok, message = quantize(o)
    assert.is_nil(ok)
    local needed = assert(message:match("needs ([%d.]+) KiB, 100 B are free"))
    local bytes = 0
    for name in pairs(whole) do bytes = bytes + core.file_info(dir .. "/whole/" .. name) end
    assert.is_true(needed * 1024 < bytes - 140000, message)
  end)

  it("keeps the date and the command of the run that began", function()
    cut_off("o.command = 'first'")
    assert(quantize { source = SOURCE, out = out, recipe = "unsloth", bits = 4,
      shard_bytes = 150000, resume = true, command = "second" })
    local facts = assert(json.read(out .. "/moonlet.json"))
    assert.equal("first", facts.command)
    assert.equal("1970-01-01T00:00:00Z", facts.date)
  end)
end)
