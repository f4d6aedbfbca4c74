local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"

describe("a journal", function()
  local dir, path
  before_each(function()
    dir = checkpoint.directory()
    path = dir .. "/journal"
  end)
  after_each(function() checkpoint.remove(dir) end)

  it("gives back the lines that were appended", function()
    local j = assert(core.journal_create(path))
    assert.equal("", j:text())
    assert(j:append "one")
    assert(j:append "two words")
    assert.equal("", j:text())
    j:close()
    j:close()
    local again <close> = assert(core.journal_open(path))
    assert.equal("one\ntwo words\n", again:text())
    assert(again:append "three")
    assert.equal("one\ntwo words\nthree\n", checkpoint.slurp(path))
  end)

  it("cuts off a line that was not finished", function()
    checkpoint.spit(path, "one\ntwo\nthr")
    local j <close> = assert(core.journal_open(path))
    assert.same({ "one\ntwo\n", "thr" }, { j:text() })
    assert.equal("one\ntwo\nthr", checkpoint.slurp(path))
    assert(j:append "three")
    assert.equal("one\ntwo\nthree\n", checkpoint.slurp(path))
  end)

  it("is new when created and there when opened", function()
    assert.same({ nil, path .. ": cannot open: No such file or directory", "io" },
      { core.journal_open(path) })
    core.journal_create(path):close()
    assert.same({ nil, path .. ": cannot open: File exists", "io" }, { core.journal_create(path) })
    assert.same({ nil, dir .. ": cannot open: Is a directory", "io" }, { core.journal_open(dir) })
  end)

  it("has one owner, also within a process", function()
    local j <close> = assert(core.journal_create(path))
    local other, message, code = core.journal_open(path)
    assert.is_nil(other)
    assert.equal(path .. ": another process is writing it", message)
    assert.equal("busy", code)
    j:close()
    core.journal_open(path):close()
  end)

  it("belongs to nobody once its owner was killed", function()
    local script = dir .. "/die.lua"
    checkpoint.spit(script, ([[
      package.cpath = %q
      local j = require("moonlet.core").journal_create(%q)
      j:append "last words"
      os.execute "kill -9 $PPID"]]):format(package.cpath, path))
    os.execute("exec lua5.4 " .. script)
    local j <close> = assert(core.journal_open(path))
    assert.equal("last words\n", j:text())
  end)

  it("is a regular file", function()
    assert.same({ nil, "/dev/full: not a journal", "format" }, { core.journal_open "/dev/full" })
  end)

  it("takes one line at a time", function()
    local j <close> = assert(core.journal_create(path))
    assert.error_matches(function() j:append "one\ntwo" end, "one line expected")
    assert.is_true(j:append "")
  end)

  it("raises when closed", function()
    local j = assert(core.journal_create(path))
    j:close()
    assert.error_matches(function() j:append "x" end, "journal is closed")
    assert.error_matches(function() j:text() end, "journal is closed")
  end)
end)

describe("a hash", function()
  it("is SHA-256", function() -- FIPS 180-2, appendix B
    assert.equal("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
      core.sha256 "abc")
    assert.equal("cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
      core.sha256(("a"):rep(1000000)))
    assert.equal("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
      core.sha256 "")
  end)

  it("of a file is that of its bytes", function()
    local path = os.tmpname()
    finally(function() os.remove(path) end)
    for _, text in ipairs { "", "abc", ("0123456789"):rep(1000000) } do -- more than one chunk
      checkpoint.spit(path, text)
      assert.equal(core.sha256(text), core.sha256_file(path))
    end
    assert.same({ nil, "/nosuch: No such file or directory", "io" },
      { core.sha256_file "/nosuch" })
  end)
end)
