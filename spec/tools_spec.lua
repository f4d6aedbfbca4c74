-- Built-in tools of agents, from what can go wrong.

local moonlet = require "moonlet"
local sched = require "moonlet.sched"
local workspace = require "spec.support.workspace"

describe("tools", function()
  local loop, place, outside, by_name
  before_each(function()
    loop, outside = assert(sched.open()), workspace.new { ["secret.txt"] = "secret" }
    place = workspace.new()
    by_name = {}
    for _, tool in ipairs(assert(moonlet.tools(moonlet.tools.names, place.dir))) do
      by_name[tool.name] = tool
    end
  end)
  after_each(function()
    loop:close()
    place.remove()
    outside.remove()
  end)

  -- A tool's answer, or nil and what went wrong.
  local function use(name, given)
    local out
    loop:spawn(function()
      out = table.pack(by_name[name].run(given, { loop = loop, on_cancel = function() end }))
      loop:stop()
    end)
    assert(loop:run())
    return table.unpack(out, 1, out.n)
  end

  local function fails(pattern, name, given)
    local answer, message = use(name, given)
    assert.is_nil(answer)
    assert.matches(pattern, message)
  end

  it("are made by name", function()
    local list, message = moonlet.tools({ "read", "fly" }, place.dir)
    assert.is_nil(list)
    assert.equal("there is no tool 'fly'; built in are read, write, edit, list, grep, bash",
      message)
    list, message = moonlet.tools({ "read" }, place.path "none")
    assert.is_nil(list)
    assert.matches("none: cannot find", message)
    place.write("file", "")
    list, message = moonlet.tools({ "read" }, place.path "file")
    assert.is_nil(list)
    assert.matches("not a directory", message)
  end)

  it("name paths from the directory where the system refuses them", function()
    place.write("sub/f", "")
    for _, name in ipairs { "read", "write", "edit", "list" } do
      fails("^sub/f/x: sub/f is no directory$", name, { path = "sub/f/x", content = "",
        old_text = "a", new_text = "b" })
    end
    place.write("sub/g.partial", "")
    fails("^sub/g%.partial: exists, ", "write", { path = "sub/g", content = "" })
  end)

  -- ---- the directory ---------------------------------------------------------------------------

  describe("stay in their directory", function()
    before_each(function()
      place.write("in.txt", "inside")
      place.run("mkdir sub; ln -s '" .. outside.dir .. "' way; ln -s '" .. outside.dir
        .. "/secret.txt' file; ln -s '" .. outside.dir .. "/new.txt' dangling; ln -s ../in.txt "
        .. "sub/back; ln -s loop loop; mkdir '" .. place.dir .. "-beside'; echo x >'" .. place.dir
        .. "-beside/f'")
    end)
    after_each(function() os.execute("rm -r '" .. place.dir .. "-beside'") end)

    it("and know it by all its names", function()
      for _, path in ipairs { "in.txt", "./in.txt", "sub/../in.txt", "sub//..//in.txt",
        place.path "in.txt", place.path "sub/../in.txt", "sub/back" } do
        assert.equal("inside", use("read", { path = path }), path)
      end
    end)

    it("whatever leads out", function()
      local beside = "../" .. place.dir:match("[^/]+$") .. "-beside/f"
      for _, path in ipairs { beside, place.dir .. "-beside/f", "/etc/passwd",
        "way/secret.txt", "file", "way", "..", "/", "sub/../../x",
        outside.path "secret.txt", outside.path "secret.txt/x", "/proc/self/environ" } do
        fails("is outside the working directory", "read", { path = path })
        fails("is outside the working directory", "write", { path = path, content = "x" })
        fails("is outside the working directory", "edit",
          { path = path, old_text = "s", new_text = "x" })
        fails("is outside the working directory", "list", { path = path })
        fails("is outside the working directory", "grep", { pattern = "s", path = path })
      end
      assert.equal("secret", outside.read "secret.txt")
    end)

    it("also where nothing is yet", function()
      fails("is outside", "write", { path = "way/new.txt", content = "x" })
      fails("is outside", "write", { path = "way/new/deep.txt", content = "x" })
      fails("a link to something that is not there", "write",
        { path = "dangling", content = "x" })
      fails("a link to something that is not there", "write",
        { path = "dangling/below", content = "x" })
      fails("a link to something", "read", { path = "loop" })
      fails("no such directory", "write", { path = "none/../../x", content = "x" })
      fails("no NUL bytes", "write", { path = "a\0b", content = "x" })
      assert.equal("secret.txt\n", outside.run("ls"))
    end)

    it("also in what is put beside a file while it is written", function()
      place.run("ln -s '" .. outside.path "secret.txt" .. "' in.txt.partial")
      fails("in%.txt%.partial: exists", "write", { path = "in.txt", content = "x" })
      assert.equal("secret", outside.read "secret.txt")
      assert.equal("inside", place.read "in.txt")
    end)

    it("and do not follow links when they walk", function()
      assert.equal("dangling@\nfile@\nin.txt\nloop@\nsub/\nsub/back@\nway@",
        use("list", { depth = 9 }))
      assert.equal("in.txt:1:inside", (use("grep", { pattern = "inside|secret" }):gsub("^%./", "")))
    end)
  end)

  -- ---- read ------------------------------------------------------------------------------------

  describe("read", function()
    it("gives a file as it is", function()
      for _, text in ipairs { "one\ntwo\n", "no newline", "\n\n", "a\r\nb\r\n", "gr\u{FC}n" } do
        place.write("f", text)
        assert.equal(text, use("read", { path = "f" }))
      end
      place.write("f", "")
      assert.equal("[the file is empty]", use("read", { path = "f" }))
    end)

    it("gives parts, and says where to go on", function()
      place.write("f", "1\n2\n3\n4\n5\n")
      assert.equal("1\n2\n[lines 1 to 2 of 5; go on with offset 3]",
        use("read", { path = "f", limit = 2 }))
      assert.equal("3\n4\n[lines 3 to 4 of 5; go on with offset 5]",
        use("read", { path = "f", offset = 3, limit = 2 }))
      assert.equal("5\n", use("read", { path = "f", offset = 5, limit = 2 }))
      fails("f has 5 lines; offset 6 is behind its end", "read", { path = "f", offset = 6 })
    end)

    it("gives no more than a prompt can take", function()
      place.write("lines", ("x\n"):rep(5000))
      local text = use("read", { path = "lines" })
      assert.matches("%[lines 1 to 2000 of 5000; go on with offset 2001%]$", text)
      place.write("wide", (("y"):rep(999) .. "\n"):rep(100))
      text = use("read", { path = "wide" })
      assert.matches("%[lines 1 to 49 of 100; go on with offset 50%]$", text)
      place.write("long", ("\u{20AC}"):rep(30000) .. "\nnext\n")
      text = use("read", { path = "long" })
      assert.matches("%[line 1 is longer than 49152 bytes and was cut here%]$", text)
      assert.equal(16384, utf8.len(text:match("^[^\n]*")))
      assert.equal("next\n", use("read", { path = "long", offset = 2 }))
    end)

    it("refuses what is no text", function()
      place.write("zeros", "a\0b")
      place.write("latin", "gr\xFCn")
      fails("zeros: a binary file of 3 bytes", "read", { path = "zeros" })
      fails("latin: a binary file of 4 bytes", "read", { path = "latin" })
      fails("zeros: a binary file", "edit", { path = "zeros", old_text = "a", new_text = "c" })
      place.run("mkdir dir; mkfifo fifo; truncate -s 65M huge")
      fails("dir: a directory, not a file", "read", { path = "dir" })
      fails("fifo: neither a file nor a directory", "read", { path = "fifo" })
      fails("none: no such file", "read", { path = "none" })
      fails("huge: 68157440 bytes are too much", "read", { path = "huge" })
    end)
  end)

  -- ---- write and edit --------------------------------------------------------------------------

  describe("write", function()
    it("creates files, and directories above them", function()
      assert.equal("Successfully wrote 3 bytes to a/b/c.txt",
        use("write", { path = "a/b/c.txt", content = "abc" }))
      assert.equal("abc", place.read "a/b/c.txt")
      use("write", { path = "a/b/c.txt", content = "" })
      assert.equal("", place.read "a/b/c.txt")
      assert.equal("c.txt\n", place.run("ls -A a/b"))
    end)

    it("keeps permissions, and goes through links inside", function()
      place.write("run.sh", "old")
      place.run("chmod 750 run.sh; ln -s run.sh link")
      use("write", { path = "link", content = "new" })
      assert.equal("new", place.read "run.sh")
      assert.equal("750 run.sh\n", place.run("stat -c '%a %n' run.sh"))
      assert.equal("link -> run.sh\n", place.run("readlink -n link | sed 's/^/link -> /'; echo"))
    end)

    it("fails where it cannot", function()
      place.run("mkdir dir")
      place.write("file", "x")
      fails("dir: a directory, not a file", "write", { path = "dir", content = "x" })
      for _, path in ipairs { "new/", "new/.", "file/", "file/.", "new/new/" } do
        fails(path:gsub("%.", "%%.") .. ": no such directory", "write",
          { path = path, content = "x" })
      end
      assert.equal("dir\nfile\n", place.run("ls"))
      fails("", "write", { path = "file/below", content = "x" })
      assert.equal("x", place.read "file")
    end)
  end)

  describe("edit", function()
    local function edit(old, new, path)
      return use("edit", { path = path or "f", old_text = old, new_text = new })
    end

    it("replaces what occurs once", function()
      place.write("f", "one two\nthree % two2\n")
      assert.equal("ok", edit("three % ", "%1"))
      assert.equal("one two\n%1two2\n", place.read "f")
      assert.equal("ok", edit(" two\n%1", ""))
      assert.equal("onetwo2\n", place.read "f")
    end)

    it("changes nothing otherwise", function()
      place.write("f", "a b\na c\n\na aaa\n")
      fails("f: old_text was not found", "edit", { path = "f", old_text = "x", new_text = "y" })
      fails("found 6 times %(lines 1, 2, 4, 4, 4, 4%)", "edit",
        { path = "f", old_text = "a", new_text = "y" })
      fails("found 2 times %(lines 4, 4%)", "edit", { path = "f", old_text = "aa", new_text = "y" })
      fails("old_text is empty", "edit", { path = "f", old_text = "", new_text = "y" })
      fails("none: no such file", "edit", { path = "none", old_text = "a", new_text = "y" })
      assert.equal("a b\na c\n\na aaa\n", place.read "f")
    end)

    it("keeps the line ends of a file", function()
      place.write("f", "one\r\ntwo\r\nthree\r\n")
      assert.equal("ok", edit("one\ntwo\n", "1\n2\n"))
      assert.equal("1\r\n2\r\nthree\r\n", place.read "f")
      assert.equal("ok", edit("three", "3\nthree"))
      assert.equal("ok", edit("2\r\n", "two\nand\r\n"))
      assert.equal("1\r\ntwo\nand\r\n3\r\nthree\r\n", place.read "f") -- as told where it is told
      place.write("f", "one\ntwo\r\n")
      assert.equal("ok", edit("two\n", "2\n"))
      assert.equal("ok", edit("one", "0\n1"))
      assert.equal("0\n1\n2\r\n", place.read "f")
    end)

    it("counts places, and names the first ones", function()
      place.write("f", ("a\n"):rep(1000))
      fails("found 1000 times %(lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10%)", "edit",
        { path = "f", old_text = "a", new_text = "y" })
    end)
  end)

  -- ---- list ------------------------------------------------------------------------------------

  describe("list", function()
    it("is sorted and marks directories", function()
      place.run("mkdir -p b/c; touch a b/c/d z .hidden")
      assert.equal(".hidden\na\nb/\nz", use("list", {}))
      assert.equal(".hidden\na\nb/\nb/c/\nb/c/d\nz", use("list", { path = ".", depth = 3 }))
      assert.equal("b/c/", use("list", { path = "b" }))
      assert.equal("b/c/d", use("list", { path = place.path "b/c" }))
    end)

    it("says when there is nothing, or too much", function()
      assert.equal("[the directory is empty]", use("list", {}))
      fails("none: no such directory", "list", { path = "none" })
      outside.run("rmdir " .. place.dir)
      fails("%.: no such directory", "list", {})
      outside.run("mkdir " .. place.dir)
      place.run("for i in $(seq 1001); do : > f$i; done")
      assert.matches("\n%[1000 of 1001 entries; list a directory below%]$", use("list", {}))
    end)
  end)

  -- ---- grep ------------------------------------------------------------------------------------

  describe("grep", function()
    before_each(function()
      place.write("a.c", "int main(void)\n{\n    return 0;\n}\n")
      place.write("sub/b.h", "int f(void);\n")
      place.write(".git/x", "int main\n")
      place.write("bin", "int\0main\n")
    end)

    it("finds lines, with file and number", function()
      local lines = {}
      for line in use("grep", { pattern = "^int\\s\\w+" }):gmatch("[^\n]+") do
        lines[#lines + 1] = line
      end
      table.sort(lines)
      assert.same({ "./a.c:1:int main(void)", "./sub/b.h:1:int f(void);" }, lines)
      assert.equal("sub/b.h:1:int f(void);", use("grep", { pattern = "int", path = "sub" }))
      assert.equal("a.c:3:    return 0;", use("grep", { pattern = "\\d;", path = "a.c" }))
      assert.matches("b%.h", use("grep", { pattern = "INT", ignore_case = true, include = "*.h" }))
    end)

    it("says when there are none, and why it cannot", function()
      assert.equal("[no matches]", use("grep", { pattern = "INT" }))
      assert.equal("[no matches]", use("grep", { pattern = "--version" }))
      fails("grep: ", "grep", { pattern = "(" })
      fails("^pattern and include have no NUL bytes", "grep", { pattern = "a\0b" })
      fails("^pattern and include have no NUL bytes", "grep", { pattern = "a", include = "\0" })
      fails("No such file", "grep", { pattern = "x", path = "none" })
    end)

    it("waits for no FIFO and no device", function()
      place.run("mkfifo fifo; ln -s fifo link")
      for _, path in ipairs { "fifo", "link" } do
        fails(path .. ": neither a file nor a directory", "grep", { pattern = "x", path = path })
        fails(path .. ": neither a file nor a directory", "list", { path = path })
        fails(path .. ": neither a file nor a directory", "write", { path = path, content = "" })
      end
      assert.matches("a%.c", use("grep", { pattern = "int main" }))
    end)

    it("cuts what is too long", function()
      place.write("long", ("a line that matches\n"):rep(10000))
      local text = use("grep", { pattern = "matches" })
      assert.is_true(#text < 34000)
      assert.matches("bytes are left out here", text)
    end)
  end)

  -- ---- bash ------------------------------------------------------------------------------------

  describe("bash", function()
    it("runs commands in the directory", function()
      place.write("f", "text\n")
      assert.equal("text", use("bash", { command = "cat f" }))
      assert.equal("[no output]", use("bash", { command = "true" }))
    end)

    it("tells of commands that fail", function()
      fails("^oh\n%[exit code 3%]$", "bash", { command = "echo oh; exit 3" })
      fails("^%[exit code 1%]$", "bash", { command = "false" })
      fails("%-%-version: command not found", "bash", { command = "--version" })
      fails("no NUL bytes", "bash", { command = "true\0false" })
      fails("^%[ended by signal 9%]$", "bash", { command = "kill -9 $$" })
      fails("^%[stopped after 0%.05 s; what ran is killed%]$", "bash",
        { command = "exec sleep 1000", timeout = 0.05 })
    end)

    it("keeps beginning and end of long outputs, without broken characters", function()
      local text = use("bash", { command = "printf 'first\\n'; yes line | head -n 100000; "
        .. "printf 'bad \\377\\nlast\\n'" })
      assert.matches("^first\n", text)
      assert.matches("\nbad \u{FFFD}\nlast$", text)
      assert.is_true(#text < 34000)
    end)
  end)
end)
