-- Where results may be written, and what is never touched.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local moonlet = require "moonlet"
local outputs = require "moonlet.outputs"
local safetensors = require "moonlet.safetensors"
local sys = require "moonlet.sys"

local DEMO <const> = "examples/demo-model"
local ENTRIES <const> = { { name = "w", dtype = "U8", shape = { 1 }, data = "x" } }

describe("a result", function()
  local dir, path, beside

  before_each(function()
    dir = checkpoint.directory()
    path = dir .. "/r"
    beside = path .. ".partial"
  end)
  after_each(function() os.execute("rm -r " .. dir) end)

  local WRITERS <const> = {
    ["a small file"] = function() return sys.write_file(path, "new") end,
    safetensors = function() return safetensors.write(path, ENTRIES) end,
    ["an imatrix"] = function()
      local zero = string.pack("<f", 0)
      return core.imatrix_write(path, { { name = "v", n_in = 1, n_mat = 1, sums2 = zero,
        sums = zero, counts = zero } }, { datasets = {} })
    end,
    ["a check"] = function() return outputs.check(path) end,
  }

  for kind, write in pairs(WRITERS) do
    it("leaves what others have beside it alone: " .. kind, function()
      checkpoint.spit(beside, "mine")
      local ok, message, code = write()
      assert.same({ nil, beside .. ": exists, left by a run that died or of another origin; "
        .. "remove it", "io" }, { ok, message, code })
      assert.equal("mine", checkpoint.slurp(beside))
      assert.is_nil(core.file_kind(path))
    end)

    it("does not follow a link beside it: " .. kind, function()
      checkpoint.spit(dir .. "/target", "mine")
      os.execute(("ln -s target %s"):format(beside))
      assert.is_nil(write())
      assert.equal("mine", checkpoint.slurp(dir .. "/target"))
      assert.equal("link", core.file_kind(beside))
    end)
  end

  it("leaves nothing beside it that was only looked for", function()
    assert.is_true(outputs.check(path))
    assert.same({}, core.list_dir(dir))
  end)

  it("has one writer at a time, which others do not disturb", function()
    local model <close> = assert(moonlet.open(DEMO, { threads = 1, precision = "exact" }))
    local text, said = ("It was the best of times. "):rep(8), nil
    assert(moonlet.eval.save_logits(model, { text = text, window = 24, out = path,
      on_progress = function()
        said = said or { moonlet.eval.save_logits(model, { text = text, window = 24,
          out = path }) }
        assert.equal("file", core.file_kind(beside))
      end }))
    assert.same({ nil, beside .. ": another run is writing it", "busy" }, said)
    assert.same({ r = true }, core.list_dir(dir))
  end)

  it("is not what has been put in the place of the file that it grew in", function()
    local model <close> = assert(moonlet.open(DEMO, { threads = 1, precision = "exact" }))
    for _, fails in ipairs { false, true } do
      local ok, result, message = pcall(moonlet.eval.save_logits, model, { out = path,
        text = "Call me Ishmael.", on_progress = function()
          os.remove(beside)
          checkpoint.spit(beside, "another's")
          if fails then error("no more") end
        end })
      assert.equal(fails, not ok)
      if ok then
        assert.same({ nil, beside .. ": is not the file that was written there" },
          { result, message })
      end
      assert.equal("another's", checkpoint.slurp(beside))
      assert.is_nil(core.file_kind(path))
      os.remove(beside)
    end
  end)

  it("replaces files and links to files only", function()
    for _, make in ipairs { "mkfifo %s", "ln -s /dev/null %s", "ln -s nowhere %s" } do
      os.execute(make:format(path))
      local kind = core.file_kind(path)
      local ok, message, code = outputs.check(path)
      assert.same({ nil, path .. ": is not a regular file; results are written to files only",
        "io" }, { ok, message, code })
      assert.equal(kind, core.file_kind(path))
      local result
      result, message = moonlet.imatrix { model = DEMO, text = "Call me.", out = path }
      assert.is_nil(result)
      assert.matches("is not a regular file", message)
      os.remove(path)
    end
  end)

  it("is never what the system shows as a file", function()
    local kept <close> = assert(io.open(dir .. "/kept", "w"))
    local n = 3
    while core.real_path("/dev/fd/" .. n) ~= core.real_path(dir .. "/kept") do n = n + 1 end
    os.execute(("ln -s /dev/fd/%d %s"):format(n, path))
    for _, place in ipairs { path, "/dev/fd/" .. n, "/proc/self/fd/" .. n, "/dev/moonlet" } do
      local said = place .. ": is not a regular file; results are written to files only"
      assert.same({ nil, said, "io" }, { outputs.check(place) })
      assert.same({ nil, said, "io" }, { sys.write_file(place, "new") })
    end
    assert.equal("link", core.file_kind(path))
    assert.equal("/dev/shm/x", kept and core.file_target "/dev/shm/x")
  end)

  for kind, write in pairs(WRITERS) do
    it("is written through links to a file: " .. kind, function()
      assert(core.make_dir(dir .. "/a"))
      checkpoint.spit(dir .. "/a/target", "mine")
      os.execute(("cd %s && ln -s a/target q && ln -s $PWD/q r"):format(dir))
      assert(write())
      assert.equal("link", core.file_kind(path))
      assert.same({ target = true }, core.list_dir(dir .. "/a"))
      assert.equal("file", core.file_kind(dir .. "/a/target"))
      assert.equal(kind == "a check", checkpoint.slurp(dir .. "/a/target") == "mine")
      checkpoint.spit(dir .. "/a/target.partial", "mine")
      assert.matches("^/.*/a/target%.partial: exists, left by", select(2, write()))
    end)
  end

  it("grows beside the file that a link leads to", function()
    assert(core.make_dir(dir .. "/a"))
    checkpoint.spit(dir .. "/a/target", "mine")
    os.execute(("ln -s a/target %s"):format(path))
    assert(moonlet.imatrix { model = DEMO, text = "Call me Ishmael.", out = path,
      on_progress = function()
        assert.equal("directory", core.file_kind(dir .. "/a/target.partial"))
      end })
    assert.equal("link", core.file_kind(path))
    assert.equal("GGUF", checkpoint.slurp(dir .. "/a/target"):sub(1, 4))
    assert.same({ a = false, r = true }, core.list_dir(dir))
  end)

  it("is not what is read, by whatever link", function()
    checkpoint.spit(dir .. "/text", "mine")
    os.execute(("cd %s && ln -s text r && ln -s r s"):format(dir))
    for _, pair in ipairs { { "r", "text" }, { "s", "r" }, { "text", "s" } } do
      assert.same({ nil, dir .. "/" .. pair[1] .. ": is read; choose another place", "io" },
        { outputs.check(dir .. "/" .. pair[1], dir .. "/" .. pair[2]) })
    end
    assert.equal("x are one file", outputs.clash(path, dir .. "/./text", "x"))
  end)

  it("is not what another of the same run grows in", function()
    for _, pair in ipairs { { "r", "r.partial" }, { "r.partial", "./r" },
        { "r", "r.partial/journal" } } do
      assert.error_matches(function()
        moonlet.imatrix { model = DEMO, text = "Call me.", out = dir .. "/" .. pair[1],
          hessians = dir .. "/" .. pair[2] }
      end, "one of options 'out' and 'hessians' is or lies in the other's %.partial")
      assert.same({}, core.list_dir(dir))
    end
  end)

  it("needs a directory, and a name in it", function()
    assert.same({ nil, ("%s/none/r: %s/none: cannot find: No such file or directory"):format(dir,
      dir), "io" }, { outputs.check(dir .. "/none/r") })
    assert.same({ nil, path .. "/: Is a directory", "io" }, { outputs.check(path .. "/") })
  end)
end)
