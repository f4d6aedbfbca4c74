-- docs/api.md runs as it is written; docs/cli.md and --help name the same commands and options;
-- files that documents point to exist.

local json = require "moonlet.json"

local PATHS <const> = "LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' LUA_CPATH='"
  .. package.cpath:gsub("'", "") .. "' "

local function slurp(path)
  local file = assert(io.open(path))
  local text = file:read("a")
  file:close()
  return text
end

-- The ```lua blocks as one program; everything else is empty lines, so that errors name the line
-- of the page. Also: line -> what it prints, where a comment says so.
local function program(path)
  local lines, expected, inside = {}, {}, false
  for line in io.lines(path) do
    local fence = line:match("^```(%w*)")
    if fence then inside = not inside and fence == "lua" end
    local code = inside and not fence and line or ""
    lines[#lines + 1] = code
    expected[#lines] = code:match("%-%-> (.*)$")
  end
  return table.concat(lines, "\n"), expected
end

describe("docs/api.md", function()
  it("runs, and prints what it says", function()
    local source, expected = program("docs/api.md")
    local printed = {}
    local env = setmetatable({ print = function(...)
      local words = table.pack(...)
      for i = 1, words.n do words[i] = tostring(words[i]) end
      printed[debug.getinfo(2, "l").currentline] = table.concat(words, "\t")
    end }, { __index = _G })
    assert(load(source, "@docs/api.md", "t", env))()
    assert.is_true(next(expected) ~= nil)
    for line, text in pairs(expected) do
      assert.equal(text, printed[line], "docs/api.md:" .. line)
    end
  end)
end)

-- ---- the command line ---------------------------------------------------------------------------

local function help(command)
  local pipe = assert(io.popen(PATHS .. "lua5.4 bin/moonlet " .. command .. " --help 2>&1"))
  local text = pipe:read("a")
  assert(pipe:close(), text)
  return text
end

-- Long options, and short ones that have no long form, of a text.
local function options_of(text)
  local found = {}
  for option in text:gmatch("%-%-%l[%l-]*") do found[option] = true end
  for option in text:gmatch("%f[%w%-]%-%a%f[^%w]") do found[option] = true end
  found["-h"], found["--help"] = nil, nil
  return found
end

-- What parser lists after "Commands:".
local function commands_of(text)
  local list = {}
  for name in (text:match("\nCommands:\n(.-)\n\n") or text:match("\nCommands:\n(.*)$") or "")
    :gmatch("%f[^\n%z]   (%l+) ") do
    list[#list + 1] = name
  end
  return list
end

-- Sections "## moonlet NAME" of the page.
local function sections(page)
  local found = {}
  for name, body in (page:gsub("\n## ", "\0## ") .. "\0"):gmatch("## moonlet ([%l ]+)\n(.-)%z") do
    found[name] = body
  end
  return found
end

-- Every command that there is, with its help; eval's are "eval ppl".
local function all_commands()
  local found = {}
  for _, name in ipairs(commands_of(help "")) do
    local text = help(name)
    local below = commands_of(text)
    if #below == 0 then found[name] = text end
    for _, measure in ipairs(below) do
      found[name .. " " .. measure] = help(name .. " " .. measure)
    end
  end
  return found
end

describe("docs/cli.md", function()
  local page = sections(slurp "docs/cli.md")

  it("has the commands that --help has", function()
    local documented, built = {}, {}
    for name in pairs(page) do documented[name] = true end
    for name in pairs(all_commands()) do built[name] = true end
    assert.is_true(next(built) ~= nil)
    assert.same(built, documented)
  end)

  it("is about options that say their default once", function()
    for name, text in pairs(all_commands()) do
      for line in text:gmatch("[^\n]+") do
        local _, n = line:gsub("%(default", "")
        assert.is_true(n <= 1, name .. ": " .. line)
      end
    end
  end)

  it("has the options of every command, and no others", function()
    for name, text in pairs(all_commands()) do
      assert.same(options_of(text), options_of(page[name]), name)
    end
  end)
end)

-- ---- results ------------------------------------------------------------------------------------

-- Cells of the rows of a page's tables that hold recipe options, each table as one list.
local function result_rows(path)
  local tables, current = {}, nil
  for line in io.lines(path) do
    if line:find("^|.*`%-%-recipe") then
      if not current then
        current = {}
        tables[#tables + 1] = current
      end
      local cells = {}
      for cell in line:gmatch("| ([^|]*) %f[|]") do cells[#cells + 1] = cell:match("^`?(.-)`?$") end
      current[#current + 1] = cells
    else
      current = nil
    end
  end
  return tables
end

local function moonlet_json(arguments)
  local pipe = assert(io.popen(PATHS .. "lua5.4 bin/moonlet " .. arguments .. " --json 2>&1"))
  local text = pipe:read("a")
  assert(pipe:close(), text)
  return assert(json.decode(text))
end

local function with_commas(n)
  return (("%d"):format(n):reverse():gsub("(%d%d%d)", "%1,"):reverse():gsub("^,", ""))
end

describe("docs/results.md", function()
  local demo, real = table.unpack(result_rows("docs/results.md"))

  it("has the sizes that plans give", function()
    assert.is_true(#demo >= 10 and #real >= 10)
    for _, row in ipairs(demo) do
      local command = "plan examples/demo-model "
      if row[1]:find("--format", 1, true) then -- plans are about MLX checkpoints
        command = "quantize examples/demo-model /tmp/never --dry-run "
      end
      local plan = moonlet_json(command .. row[1])
      assert.same({ row[1], with_commas(plan.part_bytes.text),
        ("%.3f"):format(plan.bits_per_weight) }, { row[1], row[2], row[3] })
    end
    for _, row in ipairs(real) do
      local plan = moonlet_json(("plan spec/golden/configs/%s.json %s"):format(row[1]:lower(),
        row[2]))
      assert.same({ row[2], ("%.2f GiB"):format(plan.total_bytes / 2 ^ 30),
        ("%.3f"):format(plan.bits_per_weight) }, { row[2], row[3], row[4] })
    end
  end)

  it("has the perplexities and divergences that come out #slow", function()
    local dir = os.tmpname()
    os.remove(dir)
    assert(os.execute("mkdir " .. dir))
    moonlet_json(("eval kld examples/demo-model --save-logits %s/logits "
      .. "--chat examples/demo-model/eval.jsonl --dialogues 1-150"):format(dir))
    for i = 1, #demo, 3 do -- every third: all of them take minutes
      local row, out = demo[i], dir .. "/out"
      moonlet_json(("quantize examples/demo-model %s %s"):format(out, row[1]))
      local result = moonlet_json(("eval kld %s --reference-logits %s/logits"):format(out, dir))
      assert.same({ row[1], row[4], row[5] }, { row[1], ("%.4f"):format(result.perplexity),
        ("%.3g"):format(result.mean) })
      os.execute("rm -r " .. out)
    end
    os.execute("rm -r " .. dir)
  end)
end)

describe("documents", function()
  for _, path in ipairs { "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/agent.md",
    "docs/api.md", "docs/cli.md", "docs/formats.md", "docs/performance.md", "docs/quantize.md",
    "docs/recipes.md", "docs/results.md", "docs/server.md" } do
    it(path .. " links to files that exist", function()
      local text, dir = slurp(path), path:match("^(.*/)") or ""
      for target in text:gmatch("%]%(([^)#]+)[^)]*%)") do
        if not target:find("^https?:") then
          local file = io.open(dir .. target)
          assert(file, ("%s: no %s"):format(path, target))
          file:close()
        end
      end
    end)
  end
end)
