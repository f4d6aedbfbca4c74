-- The report page: well formed, self-contained, with every result in it and nothing unescaped.
local moonlet = require "moonlet"
local report = require "moonlet.eval.report"
local svg = require "moonlet.eval.svg"

local function result(label, bytes, mean)
  local counts = {}
  for i = 1, 48 do counts[i] = i > 10 and i < 40 and i or 0 end
  return { label = label, model = label, reference = "ref", tokens = 1000, words = 700,
    mean = mean, mean_error = mean / 10, median = mean / 5, p99 = mean * 9, p999 = mean * 20,
    max = mean * 50, top1 = 0.98, perplexity = 6.2, reference_perplexity = 6.1, bytes = bytes,
    bits_per_weight = 4.25, histogram = { least = -10, bins_per_decade = 4, counts = counts },
    layers = { 0.1, 0.12, 0.2 }, matrices = {
      { name = "embed_tokens", class = "embed", bits = 8.5, bytes = 1000 },
      { name = "layers.0.mlp.gate", class = "router", layer = 0, bits = 16, bytes = 500 },
      { name = "layers.1.mlp.gate", class = "router", layer = 1, bits = 2.25, bytes = 50 } } }
end

local function table_of(by)
  local function row(name, layer, mean, rule)
    return { name = name, class = "class of " .. name, layer = layer, decision = "mxfp4 g32",
      rule = rule, tensors = 2, parameters = 100, bytes = 53, saved = 147, kld_per_mib = mean,
      mean = mean, mean_error = mean / 9, median = mean, p99 = mean, p999 = mean, max = mean,
      top1 = 1, tokens = 50, perplexity = 6.2, reference_perplexity = 6.1 }
  end
  return { by = by, reference = "ref", tokens = 50, words = 40,
    rows = { row("first", 0, 0.001, 1), row("second", 1, 0.004, 1), row("third", nil, 0, 1),
      row("fourth", 0, 0.5, 2) }, totals = { row("all", nil, 0.006, 1),
      row("all", nil, 0.6, 2) } }
end

-- Every tag is closed in order; text holds no bare < or &.
local function check_markup(html)
  local body = html:gsub("^<!DOCTYPE html>\n", ""):gsub("<style>.-</style>", "")
  local open, at = {}, 1
  for from, slash, name, attributes, to in body:gmatch("()<(/?)([%a%d]+)([^<>]*)>()") do
    local text = body:sub(at, from - 1)
    assert.is_nil(text:find("[<>]"))
    assert.is_nil(text:gsub("&%a+;", ""):gsub("&#39;", ""):find("&", 1, true), text)
    if slash == "/" then
      assert.equal(table.remove(open), name)
    elseif name ~= "meta" and not attributes:find("/$") then
      open[#open + 1] = name
    end
    at = to
  end
  assert.same({}, open)
  assert.equal("\n", body:sub(at))
end

local function count(html, pattern)
  return select(2, html:gsub(pattern, ""))
end

describe("eval.report", function()
  it("is one well-formed page that needs nothing else", function()
    local html = report.html({ result("one", 1e9, 0.02), result("two", 2e9, 0.005),
      table_of "class", table_of "layer", table_of "tensor" })
    check_markup(html)
    for _, foreign in ipairs { "https?:", "<script", "url%(", "@import", "src=", "href=" } do
      assert.is_nil(html:find(foreign), foreign)
    end
    assert.is_nil(html:find("nan", 1, true))
    assert.is_nil(html:find("inf", 1, true))
    assert.matches("prefers%-color%-scheme: dark", html)
  end)

  it("shows every result, its map, and what nothing else beats", function()
    local html = report.html { result("one", 1e9, 0.02), result("two", 2e9, 0.005),
      result("worse", 2e9, 0.05) }
    for _, label in ipairs { "one", "two", "worse" } do
      assert.is_true(count(html, ">" .. label .. "<") >= 3, label)
    end
    assert.equal(3, count(html, "embed_tokens: 8.500 bits per weight"))
    -- the frontier goes through the first two
    local path = html:match('<path d="([^"]*)" class="frontier"/>')
    assert.equal(2, count(path, "[ML]"))
  end)

  it("shows every part of a damage table, a section for each decision", function()
    for _, by in ipairs { "class", "layer", "tensor" } do
      local html = report.html { table_of(by) }
      check_markup(html)
      assert.equal(2, count(html, "Damage by " .. by))
      for _, name in ipairs { "first", "second", "third", "fourth" } do
        assert.equal(1, count(html, '<td class="t">' .. name .. "</td>"), name)
      end
      assert.equal(2, count(html, '<tr class="sum">'))
    end
  end)

  it("escapes names", function()
    local evil = "<script>alert('x')</script>&\"\1\xff"
    local one, rows = result(evil, 1e9, 0.02), table_of "class"
    one.reference, rows.reference, rows.rows[1].name = evil, evil, evil
    one.matrices[1].name, one.matrices[1].class = evil, evil
    local html = report.html({ one, result(evil, 2e9, 0.01), rows }, evil)
    check_markup(html)
    assert.is_nil(html:find("<script", 1, true))
    assert.is_nil(html:find("\1", 1, true))
    assert.is_true(utf8.len(html) ~= nil)
  end)

  it("does with what there is", function()
    local bare = result("bare", 1e9, 0.02)
    bare.histogram, bare.layers, bare.matrices = nil, nil, nil
    check_markup(report.html { bare })
    local same = result("same", 1e9, 0) -- a model and itself
    same.layers = { 0, 0 }
    check_markup(report.html { same })
    check_markup(report.html { same, bare })
    local many = {}
    for i = 1, 30 do many[i] = result("number " .. i, 1e9, 1e-9 * 3 ^ i) end
    check_markup(report.html(many))
  end)

  it("refuses what is no result", function()
    for _, bad in ipairs { {}, { mean = 1 }, { rows = {}, totals = {} },
      { rows = { 5 }, totals = { 5 }, by = "class", tokens = 1 } } do
      assert.is_false(report.is_result(bad))
      assert.error_matches(function() report.html { result("a", 1, 1), bad } end,
        "result 2 is neither")
    end
    for field, broken in pairs { histogram = { 5, {}, { counts = { "x" }, least = 1,
      bins_per_decade = 4 }, { counts = { 1 }, least = 1 } }, layers = { 5, { "x" } },
      matrices = { 5, { 5 }, { { bits = 4, bytes = 5 } }, { { bits = 4, bytes = 5, class = "x",
      layer = "y" } } }, label = { 5 }, mean = { "x" }, bytes = { false } } do
      for _, bad in ipairs(broken) do
        local r = result("a", 1, 1)
        r[field] = bad
        assert.is_false(report.is_result(r), field)
      end
    end
    assert.error(function() report.html {} end)
    assert.error(function() moonlet.eval.report(5, "x") end)
    assert.error(function() moonlet.eval.report({ result("a", 1, 1) }, "x", { titel = "b" }) end)
  end)

  it("is written whole or not at all", function()
    local path = os.tmpname()
    assert(moonlet.eval.report(result("one", 1e9, 0.02), path, { title = "T" }))
    local file <close> = assert(io.open(path))
    assert.matches("<h1>T</h1>", file:read("a"))
    os.remove(path)
    local ok, message, code = moonlet.eval.report({ result("a", 1, 1) }, "/nosuch/page.html")
    assert.is_nil(ok)
    assert.matches("/nosuch/page.html", message)
    assert.equal("io", code)
  end)
end)

describe("scales", function()
  local function values(scale)
    local list = {}
    for i, tick in ipairs(scale.ticks) do list[i] = tick.value end
    return list
  end

  it("have round ticks and map their ends to the ends of the room", function()
    local s = svg.linear(0.3, 9.7, 100, 200, 5)
    assert.same({ 0, 2, 4, 6, 8, 10 }, values(s))
    assert.equal(100, s.map(0))
    assert.equal(200, s.map(10))
    assert.equal(150, s.ticks[1].at + s.map(5) - s.map(0))
    assert.same({ 5, 10 }, values(svg.linear(5, 5, 0, 1, 1)))
    assert.same({ 0.01, 0.1, 1, 10 }, (function(list)
      for i, v in ipairs(list) do list[i] = tonumber(("%.10g"):format(v)) end
      return list
    end)(values(svg.log(0.005, 20, 300, 10))))
    local log = svg.log(1, 100, 300, 100)
    assert.near(200, log.map(10), 1e-9)
    assert.is_true(#log.ticks == 7) -- 1 2 5 10 20 50 100
  end)

  it("put names where they cover nothing, if there is room", function()
    local text = svg.names({ { 100, 100, "first" }, { 104, 100, "second" } },
      { 0, 0, 400, 400 }, "mark")
    local spots = {}
    for x, y, anchor in text:gmatch('x="([%d.]+)" y="([%d.]+)" class="mark" text%-anchor="(%a+)"')
    do
      spots[#spots + 1] = { tonumber(x), tonumber(y), anchor }
    end
    assert.equal(2, #spots)
    assert.is_not.same(spots[1], spots[2])
  end)
end)
