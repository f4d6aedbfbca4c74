--- A report: results of eval.kld and eval.sensitivity as one page of tables and pictures.
local options = require "moonlet.options"
local page = require "moonlet.eval.page"
local plan = require "moonlet.plan"
local svg = require "moonlet.eval.svg"
local sys = require "moonlet.sys"

local report = {}

local WIDTH <const> = 1004

local function number(x, digits)
  return (("%." .. (digits or 3) .. "g"):format(x):gsub("e([+-])0", "e%1"))
end

-- Sizes of an axis in one unit for all its ticks.
local function size_unit(most)
  local names = { "B", "KiB", "MiB", "GiB" }
  local i = 1
  while most >= 1024 and i < #names do
    most, i = most / 1024, i + 1
  end
  return 1024.0 ^ (i - 1), names[i]
end

local function extent(list, get)
  local low, high = math.huge, -math.huge
  for _, item in ipairs(list) do
    local v = get(item)
    low, high = math.min(low, v), math.max(high, v)
  end
  return low, high
end

-- ---- results ------------------------------------------------------------------------------------

local function summary(results)
  local lines = {}
  local _, most = extent(results, function(r) return r.mean end)
  for i, r in ipairs(results) do
    local width = most > 0 and r.mean / most * 70 or 0
    lines[i] = { r.label, plan.size_text(r.bytes), ("%.3f"):format(r.bits_per_weight),
      { html = ('<span class="bar" style="width:%.1fpx"></span>'):format(width) },
      ("%s ± %s"):format(number(r.mean, 4), number(r.mean_error, 2)), number(r.median),
      number(r.p99), number(r.p999), ("%.2f %%"):format(100 * r.top1),
      ("%.5g"):format(r.perplexity) }
  end
  return page.section("Results", "KL divergence from the reference in nats per scored token; "
    .. "share of positions where both prefer the same token; perplexity of the reference: "
    .. ("%.5g. Sizes are those of the text model's matrices."):format(
      results[1].reference_perplexity),
    page.table({ "<model", "size", "bits / weight", "<", "mean KLD", "median", "99 %", "99.9 %",
      "same best", "perplexity" }, lines))
end

-- Those that no other beats in both size and KLD, by size.
local function frontier(results)
  local sorted = table.move(results, 1, #results, 1, {})
  table.sort(sorted, function(a, b)
    if a.bytes ~= b.bytes then return a.bytes < b.bytes end
    return a.mean < b.mean
  end)
  local best, list = math.huge, {}
  for _, r in ipairs(sorted) do
    if r.mean < best then
      best = r.mean
      list[#list + 1] = r
    end
  end
  return list
end

local function with_damage(results)
  local list = {}
  for _, r in ipairs(results) do
    if r.mean > 0 then list[#list + 1] = r end
  end
  return list
end

local function size_chart(results)
  results = with_damage(results)
  if #results < 2 then return nil end
  local m, height = svg.MARGIN, 420
  local low, high = extent(results, function(r) return r.bytes end)
  local unit, name = size_unit(high)
  local x = svg.linear(low / unit, high / unit, m.left + 10, WIDTH - m.right - 10, 8)
  local least, most = extent(results, function(r) return r.mean end)
  local y = svg.log(least * 0.7, most * 1.4, height - m.bottom, m.top)
  local line, points, marks = {}, {}, {}
  for i, r in ipairs(frontier(results)) do
    line[i] = { x.map(r.bytes / unit), y.map(r.mean) }
  end
  marks[1] = svg.path(line, "frontier")
  for i, r in ipairs(results) do
    local at, top = x.map(r.bytes / unit), y.map(r.mean)
    local below = math.max(r.mean - r.mean_error, r.mean * 0.3)
    marks[#marks + 1] = svg.line(at, y.map(r.mean + r.mean_error), at, y.map(below), "error s1")
    marks[#marks + 1] = svg.dot(at, top, 4.5, "s1", ("%s: %s, KLD %s"):format(r.label,
      plan.size_text(r.bytes), number(r.mean, 4)))
    points[i] = { at, top, r.label }
  end
  marks[#marks + 1] = svg.names(points, { m.left, m.top, WIDTH - m.right, height - m.bottom },
    "mark")
  return page.section("Size against damage", "Mean KLD over the size of the text model's "
    .. "matrices, with its standard error. The dashed line joins what nothing else beats in both.",
    page.figure(svg.chart({ width = WIDTH, height = height, x = x, y = y,
      x_label = "size, " .. name, y_label = "mean KLD, nats", x_text = number, y_text = number,
      label = "size against mean KL divergence" }, table.concat(marks, "\n"))))
end

local function labels_of(results)
  local names = {}
  for i, r in ipairs(results) do names[i] = r.label end
  return names
end

-- Share of positions whose KLD is above each border of the bins.
local function tail_points(histogram, x, y, floor)
  local total, above, points = 0, 0, {}
  for _, n in ipairs(histogram.counts) do total = total + n end
  for i = #histogram.counts, 1, -1 do
    above = above + histogram.counts[i]
    local border = 10.0 ^ (histogram.least + (i - 1) / histogram.bins_per_decade)
    if above > 0 and above / total >= floor and i > 1 then
      table.insert(points, 1, { x(border), y(above / total) })
    end
  end
  return points
end

local function tail_chart(results)
  local list = {}
  for _, r in ipairs(with_damage(results)) do
    if r.histogram then list[#list + 1] = r end
  end
  if #list == 0 then return nil end
  local m, height = svg.MARGIN, 340
  local _, most = extent(list, function(r) return r.max end)
  local _, tokens = extent(list, function(r) return r.tokens end)
  local floor = math.max(1 / tokens, 1e-5)
  local x = svg.log(1e-8, math.max(most * 1.5, 1e-6), m.left, WIDTH - m.right)
  local y = svg.log(floor, 1, height - m.bottom, m.top)
  local marks = {}
  for i, r in ipairs(list) do
    local points = tail_points(r.histogram, x.map, y.map, floor)
    local visible = {}
    for _, p in ipairs(points) do
      if p[1] >= m.left then visible[#visible + 1] = p end
    end
    marks[i] = svg.path(visible, "curve " .. page.series(i), r.label)
  end
  return page.section("How many positions suffer", "Share of positions whose KLD is above what "
    .. "the horizontal axis says. Two models with the same mean may differ in their tails.",
    page.figure(page.key(labels_of(list)) .. svg.chart({ width = WIDTH, height = height, x = x,
      y = y, x_label = "KLD, nats", y_label = "positions above", x_text = number,
      y_text = function(v) return number(100 * v) .. " %" end,
      label = "share of positions above a KL divergence" }, table.concat(marks, "\n"))))
end

local function layer_chart(results)
  local list = {}
  for _, r in ipairs(results) do
    if r.layers then list[#list + 1] = r end
  end
  if #list == 0 then return nil end
  local m, height = svg.MARGIN, 320
  local depth, most = 1, 0
  for _, r in ipairs(list) do
    depth = math.max(depth, #r.layers)
    for _, v in ipairs(r.layers) do most = math.max(most, v) end
  end
  if most == 0 then return nil end
  local x = svg.linear(1, depth, m.left + 12, WIDTH - m.right - 12, math.min(depth, 20))
  local y = svg.linear(0, most * 100, height - m.bottom, m.top, 5)
  local marks = {}
  for i, r in ipairs(list) do
    local points, class = {}, page.series(i)
    for d, v in ipairs(r.layers) do
      points[d] = { x.map(d), y.map(v * 100) }
      marks[#marks + 1] = svg.dot(points[d][1], points[d][2], 2.5, class, ("%s, %s: %.3g %%")
        :format(r.label, d == #r.layers and "last norm" or "layer " .. d - 1, 100 * v))
    end
    marks[#marks + 1] = svg.path(points, "curve " .. class, r.label)
  end
  return page.section("Error through the layers", "What the residual stream is off by after each "
    .. "layer, as a share of its size (root mean squares); the last point is after the last norm.",
    page.figure(page.key(labels_of(list)) .. svg.chart({ width = WIDTH, height = height, x = x,
      y = y, x_label = "layers passed", y_label = "relative error, %", x_text = number,
      y_text = number, label = "relative error of the residual stream after each layer" },
      table.concat(marks, "\n"))))
end

-- ---- maps ---------------------------------------------------------------------------------------

-- Colours between which bits (or damage) are mixed: from little to much.
local RAMP <const> = { { 0xb4, 0x2f, 0x3c }, { 0xdb, 0x7b, 0x3b }, { 0xe3, 0xc0, 0x5a },
  { 0x5f, 0xa8, 0x86 }, { 0x2d, 0x74, 0x9e }, { 0x39, 0x45, 0x8c } }

-- A colour for a share from 0 to 1, and whether dark text reads better on it.
local function ramp(share)
  local at = math.max(0, math.min(1, share)) * (#RAMP - 1)
  local i = math.min(math.floor(at), #RAMP - 2)
  local mixed = {}
  for k = 1, 3 do
    mixed[k] = math.floor(RAMP[i + 1][k] + (RAMP[i + 2][k] - RAMP[i + 1][k]) * (at - i) + 0.5)
  end
  local light = 0.299 * mixed[1] + 0.587 * mixed[2] + 0.114 * mixed[3]
  return ("#%02x%02x%02x"):format(table.unpack(mixed)), light > 140
end

-- Rows by class in the order of the model, and the number of layers.
local function by_class(cells)
  local classes, known, layers = {}, {}, 0
  for _, cell in ipairs(cells) do
    if not known[cell.class] then
      known[cell.class] = { name = cell.class }
      classes[#classes + 1] = known[cell.class]
    end
    table.insert(known[cell.class], cell)
    layers = math.max(layers, (cell.layer or -1) + 1)
  end
  return classes, layers
end

---Cells { class, layer, share, text, title } as classes by layers; one without a layer is wide.
local function heat_map(cells, label)
  local classes, layers = by_class(cells)
  local left, row, top = 120, 22, 4
  local column = (WIDTH - left - 4) / math.max(layers, 1)
  local height = top + #classes * row + 26
  local parts = {}
  for r, class in ipairs(classes) do
    local y = top + (r - 1) * row
    parts[#parts + 1] = svg.text(left - 8, y + 15, class.name, "row", "end")
    for _, cell in ipairs(class) do
      local x = left + (cell.layer or 0) * column
      local width = (cell.layer and column or WIDTH - left - 4) - 2
      local fill, is_light = ramp(cell.share)
      parts[#parts + 1] = svg.rect(x, y, width, row - 2, "", cell.title, fill)
      if width >= 6.5 * #cell.text + 4 then
        parts[#parts + 1] = svg.text(x + width / 2, y + 14, cell.text,
          is_light and "cell dark" or "cell", "middle")
      end
    end
  end
  local step = math.max(1, math.ceil(30 / column))
  for layer = 0, layers - 1, step do
    parts[#parts + 1] = svg.text(left + (layer + 0.5) * column - 1, height - 8,
      ("%d"):format(layer), "tick", "middle")
  end
  parts[#parts + 1] = svg.text(left - 8, height - 8, "layer", "tick", "end")
  return svg.picture(WIDTH, height, label, table.concat(parts, "\n"))
end

-- From 2 bits to 16, evenly in their logarithm.
local function bits_share(bits)
  return math.log(bits / 2, 2) / 3
end

local function bit_maps(results)
  local figures = {}
  for _, r in ipairs(results) do
    local cells = {}
    for i, m in ipairs(r.matrices or {}) do
      cells[i] = { class = m.class, layer = m.layer, share = bits_share(m.bits),
        text = ("%.3g"):format(m.bits), title = ("%s: %.3f bits per weight, %s"):format(m.name,
          m.bits, plan.size_text(m.bytes)) }
    end
    if #cells > 0 then
      figures[#figures + 1] = page.figure(heat_map(cells, "bits per weight of " .. r.label),
        r.label)
    end
  end
  if #figures == 0 then return nil end
  local swatches = {}
  for i, bits in ipairs { 2, 3, 4, 5, 6, 8, 16 } do
    swatches[i] = { colour = ramp(bits_share(bits)), text = ("%d"):format(bits) }
  end
  table.insert(figures, 1, page.legend(swatches))
  return page.section("Bits", "Bits per weight of every matrix, scales included, by class and "
    .. "layer. What lies outside the layers is drawn across them.", table.concat(figures, "\n"))
end

-- ---- damage -------------------------------------------------------------------------------------

local function damage_table(list, total, by)
  local sorted, lines = table.move(list, 1, #list, 1, {}), {}
  table.sort(sorted, function(a, b) return a.mean > b.mean end)
  local _, most = extent(sorted, function(row) return row.mean end)
  sorted[#sorted + 1] = total
  for i, row in ipairs(sorted) do
    local width = most > 0 and math.min(row.mean / most, 1) * 160 or 0
    lines[i] = { row.name, row.decision, plan.count_text(row.tensors), plan.size_text(row.saved),
      { html = row ~= total and ('<span class="bar" style="width:%.1fpx"></span>'):format(width)
        or "" }, ("%s ± %s"):format(number(row.mean), number(row.mean_error, 1)),
      number(row.p999), row.kld_per_mib and number(row.kld_per_mib) or "",
      class = row == total and "sum" or nil }
  end
  return page.table({ "<" .. by, "<decision", "tensors", "saved", "<", "mean KLD", "99.9 %",
    "KLD / MiB" }, lines)
end

-- Of single tensors: classes by layers, by the logarithm of their KLD.
local function damage_map(list, label)
  local low, high = math.huge, 0
  for _, row in ipairs(list) do
    if row.mean > 0 then low = math.min(low, row.mean) end
    high = math.max(high, row.mean)
  end
  if high == 0 then return "" end
  local cells, span = {}, math.max(math.log(high / low), 1e-9)
  for i, row in ipairs(list) do
    local share = row.mean > 0 and 1 - math.log(row.mean / low) / span or 1
    cells[i] = { class = row.class, layer = row.layer, share = share,
      text = ("%.0e"):format(row.mean):gsub("e([+-])0*", "e%1"), title = ("%s (%s): KLD %s")
        :format(row.name, row.decision, number(row.mean)) }
  end
  return page.figure(heat_map(cells, label), "mean KLD of each tensor alone; red is the most")
end

-- What is saved against what it costs.
local function damage_chart(list)
  local shown = {}
  for _, row in ipairs(list) do
    if row.mean > 0 and row.saved > 0 then shown[#shown + 1] = row end
  end
  if #shown < 2 then return "" end
  local m, height = svg.MARGIN, 400
  local low, high = extent(shown, function(row) return row.saved end)
  local least, most = extent(shown, function(row) return row.mean end)
  local unit, name = size_unit(high)
  local x = svg.log(low / unit * 0.7, high / unit * 1.6, m.left, WIDTH - m.right)
  local y = svg.log(least * 0.7, most * 1.4, height - m.bottom, m.top)
  local marks, points = {}, {}
  for i, row in ipairs(shown) do
    points[i] = { x.map(row.saved / unit), y.map(row.mean), row.name }
    marks[i] = svg.dot(points[i][1], points[i][2], 4, "s2", ("%s: saves %s, KLD %s"):format(
      row.name, plan.size_text(row.saved), number(row.mean)))
  end
  marks[#marks + 1] = svg.names(points, { m.left, m.top, WIDTH - m.right, height - m.bottom },
    "mark")
  return page.figure(svg.chart({ width = WIDTH, height = height, x = x, y = y,
    x_label = "saved, " .. name, y_label = "mean KLD, nats", x_text = number, y_text = number,
    label = "bytes saved against mean KL divergence" }, table.concat(marks, "\n")),
    "what is saved, and what it costs: bits belong to the upper left")
end

-- Mean KLD of each layer alone.
local function layer_bars(list)
  local layers, depth, most = {}, 0, 0
  for _, row in ipairs(list) do
    if row.layer then
      layers[#layers + 1] = row
      depth, most = math.max(depth, row.layer), math.max(most, row.mean)
    end
  end
  if most == 0 then return "" end
  local m, height = svg.MARGIN, 300
  local slot = (WIDTH - m.left - m.right) / (depth + 1)
  local y, marks = svg.linear(0, most, height - m.bottom, m.top, 5), {}
  local x = { ticks = {} }
  for layer = 0, depth, math.max(1, math.ceil(26 / slot)) do
    table.insert(x.ticks, { at = m.left + (layer + 0.5) * slot, value = layer })
  end
  for i, row in ipairs(layers) do
    local top = y.map(row.mean)
    marks[i] = svg.rect(m.left + row.layer * slot + slot * 0.15, top, slot * 0.7,
      height - m.bottom - top, "s1", ("%s: KLD %s"):format(row.name, number(row.mean)))
  end
  return page.figure(svg.chart({ width = WIDTH, height = height, x = x, y = y, x_label = "layer",
    y_label = "mean KLD, nats", x_text = number, y_text = number,
    label = "mean KL divergence of each layer alone" }, table.concat(marks, "\n")))
end

-- One section for each decision or recipe of a table.
local function damage(result)
  local sections = {}
  for rule, total in ipairs(result.totals) do
    local list = {}
    for _, row in ipairs(result.rows) do
      if row.rule == rule then list[#list + 1] = row end
    end
    local pictures = result.by == "tensor" and damage_map(list, "damage of each tensor")
      or result.by == "layer" and layer_bars(list) or damage_chart(list)
    sections[rule] = page.section(("Damage by %s: %s"):format(result.by,
      total.label or total.decision), ("Each %s of %s alone, encoded in memory, everything else "
        .. "as it is; the last line is all at once. Over %s scored tokens; bytes saved are "
        .. "against BF16."):format(result.by, result.reference, plan.count_text(result.tokens)),
      pictures .. damage_table(list, total, result.by))
  end
  return table.concat(sections, "\n")
end

-- ---- the page -----------------------------------------------------------------------------------

local NUMBERS <const> = { "mean", "mean_error", "median", "p99", "p999", "max", "top1", "tokens",
  "perplexity", "reference_perplexity", "bytes" }

local function has_numbers(row)
  for _, name in ipairs(NUMBERS) do
    if type(row) ~= "table" or type(row[name]) ~= "number" then return false end
  end
  return true
end

local function is_table(result)
  if type(result.rows) ~= "table" or type(result.totals) ~= "table" or not result.totals[1] then
    return false
  end
  for _, list in ipairs { result.rows, result.totals } do
    for _, row in ipairs(list) do
      if not has_numbers(row) or type(row.saved) ~= "number" or not row.decision then
        return false
      end
    end
  end
  return result.by ~= nil and type(result.tokens) == "number"
end

local function is_numbers(list)
  if type(list) ~= "table" then return false end
  for _, v in ipairs(list) do
    if type(v) ~= "number" then return false end
  end
  return true
end

-- What pictures are made of may be absent, but not something else.
local function has_details(r)
  local h = r.histogram
  if h ~= nil and not (type(h) == "table" and is_numbers(h.counts) and is_numbers { h.least,
    h.bins_per_decade } and h.least and h.bins_per_decade) then
    return false
  end
  if r.layers ~= nil and not is_numbers(r.layers) then return false end
  if r.matrices ~= nil and type(r.matrices) ~= "table" then return false end
  for _, m in ipairs(r.matrices or {}) do
    if type(m) ~= "table" or type(m.bits) ~= "number" or type(m.bytes) ~= "number"
      or type(m.class) ~= "string" or m.layer ~= nil and type(m.layer) ~= "number" then
      return false
    end
  end
  return true
end

---Whether a value is what eval.kld or eval.sensitivity returns, or what --json printed of it.
---@return boolean
function report.is_result(value)
  if type(value) ~= "table" then return false end
  return is_table(value) or has_numbers(value) and type(value.label) == "string"
    and type(value.bits_per_weight) == "number" and has_details(value)
end

local function sort_results(results)
  local compared, tables = {}, {}
  for i, r in ipairs(results) do
    if not report.is_result(r) then
      options.misuse(("result %d is neither of eval.kld nor of eval.sensitivity"):format(i))
    end
    local list = r.rows and tables or compared
    list[#list + 1] = r
  end
  return compared, tables
end

local function subtitle(results)
  local first = results[1]
  local text = ("Compared with %s over %s scored tokens"):format(first.reference or "?",
    plan.count_text(first.tokens))
  for _, r in ipairs(results) do
    if r.reference ~= first.reference or r.tokens ~= first.tokens then
      return text .. "; not all results are of the same reference and text"
    end
  end
  return text .. "."
end

---The page as text.
---@param results table[] what eval.kld and eval.sensitivity returned, or what --json printed
---@param title? string
---@return string html
function report.html(results, title)
  if #results == 0 then options.misuse("no results to report") end
  local compared, tables = sort_results(results)
  local sections = {}
  if #compared > 0 then
    sections[1] = summary(compared)
    for _, make in ipairs { size_chart, tail_chart, layer_chart, bit_maps } do
      sections[#sections + 1] = make(compared)
    end
  end
  for _, result in ipairs(tables) do sections[#sections + 1] = damage(result) end
  local main = #compared > 0 and compared or tables
  return page.html(title or "What quantizing did", subtitle(main), sections,
    "Written by moonlet. KL divergence is KL(reference || model) over the whole vocabulary.")
end

---Writes the page.
---@param results table[] see report.html
---@param path string
---@param opts? { title?: string }
---@return true? ok, string? message, string? code
function report.report(results, path, opts)
  opts = options.check(opts, { title = "string" })
  if type(results) ~= "table" then options.misuse("list of results expected") end
  if results.mean or results.rows then results = { results } end
  return sys.write_file(path, report.html(results, opts.title))
end

return report
