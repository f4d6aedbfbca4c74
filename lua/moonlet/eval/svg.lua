--- Small pieces of SVG: scales with ticks, axes, marks. Colours and fonts are the page's classes.
local svg = {}

---Text for HTML and SVG, attributes included.
---@param text any
---@return string
function svg.escape(text)
  local named = { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;",
    ["'"] = "&#39;" }
  text = tostring(text):gsub("[&<>\"']", named)
  text = text:gsub("[%z\1-\8\11\12\14-\31]", "\u{FFFD}") -- which XML cannot hold
  if utf8.len(text) then return text end
  return (text:gsub("[\128-\255]", "\u{FFFD}"))
end

local function coordinate(x)
  return (("%.1f"):format(x):gsub("%.0$", ""))
end

local function element(name, attributes, content)
  local parts = { "<" .. name }
  for _, pair in ipairs(attributes) do
    local value = type(pair[2]) == "number" and coordinate(pair[2]) or pair[2]
    if value then parts[#parts + 1] = (' %s="%s"'):format(pair[1], value) end
  end
  parts[#parts + 1] = content and (">%s</%s>"):format(content, name) or "/>"
  return table.concat(parts)
end

local function titled(title)
  return title and element("title", {}, svg.escape(title)) or nil
end

function svg.line(x1, y1, x2, y2, class)
  return element("line", { { "x1", x1 }, { "y1", y1 }, { "x2", x2 }, { "y2", y2 },
    { "class", class } })
end

---@param class string
---@param title? string shown when the pointer rests on it
---@param fill? string a colour that is no class's
function svg.rect(x, y, w, h, class, title, fill)
  return element("rect", { { "x", x }, { "y", y }, { "width", w }, { "height", h }, { "rx", 2 },
    { "class", class }, { "fill", fill } }, titled(title))
end

function svg.dot(x, y, radius, class, title)
  return element("circle", { { "cx", x }, { "cy", y }, { "r", radius }, { "class", class } },
    titled(title))
end

---@param anchor? "start"|"middle"|"end"
function svg.text(x, y, text, class, anchor)
  return element("text", { { "x", x }, { "y", y }, { "class", class },
    { "text-anchor", anchor } }, svg.escape(text))
end

---A line through points { x, y }.
function svg.path(points, class, title)
  local parts = {}
  for i, p in ipairs(points) do
    parts[i] = (i == 1 and "M" or "L") .. coordinate(p[1]) .. " " .. coordinate(p[2])
  end
  return element("path", { { "d", table.concat(parts) }, { "class", class } }, titled(title))
end

---@param label string what the picture shows, for readers that do not see it
function svg.picture(width, height, label, content)
  return element("svg", { { "viewBox", ("0 0 %d %d"):format(width, height) },
    { "width", ("%d"):format(width) }, { "height", ("%d"):format(height) }, { "role", "img" },
    { "aria-label", svg.escape(label) } }, content)
end

-- ---- scales -------------------------------------------------------------------------------------

---@class moonlet.svg.Scale
---@field ticks { at: number, value: number }[]
---@field map fun(value: number): number

-- The step among 1, 2, 2.5, 5 and their powers of ten that gives at most `most` ticks.
local function nice_step(span, most)
  local step = 10.0 ^ math.floor(math.log(span / most, 10))
  for _, factor in ipairs { 1, 2, 2.5, 5, 10 } do
    if span / (step * factor) <= most then return step * factor end
  end
  return step * 10
end

---Numbers from `low` to `high`, drawn from `from` to `to`; widened to whole ticks.
---@return moonlet.svg.Scale
function svg.linear(low, high, from, to, most)
  if high <= low then high = low + (low ~= 0 and math.abs(low) or 1) end
  local step = nice_step(high - low, most or 6)
  local first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  low, high = first * step, last * step
  local function map(value) return from + (value - low) / (high - low) * (to - from) end
  local ticks = {}
  for i = first, last do ticks[#ticks + 1] = { at = map(i * step), value = i * step } end
  return { map = map, ticks = ticks }
end

---The same for positive numbers by their logarithms; ticks at 1, or at 1, 2 and 5, of every decade.
---@return moonlet.svg.Scale
function svg.log(low, high, from, to)
  local a, b = math.log(low, 10), math.log(high, 10)
  if b - a < 0.5 then a, b = a - 0.25, b + 0.25 end
  local function map(value) return from + (math.log(value, 10) - a) / (b - a) * (to - from) end
  local ticks = {}
  for decade = math.floor(a), math.floor(b) do
    for _, digit in ipairs(b - a > 3 and { 1 } or { 1, 2, 5 }) do
      local value = digit * 10.0 ^ decade
      local log = math.log(value, 10)
      if log >= a - 1e-9 and log <= b + 1e-9 then
        ticks[#ticks + 1] = { at = map(value), value = value }
      end
    end
  end
  return { map = map, ticks = ticks }
end

-- ---- charts -------------------------------------------------------------------------------------

---Margins of a chart, in pixels.
svg.MARGIN = { left = 84, right = 16, top = 12, bottom = 46 }

---Axes with a grid below `marks`.
---@param c { width: integer, height: integer, x: moonlet.svg.Scale, y: moonlet.svg.Scale,
---  x_label: string, y_label: string, x_text: (fun(v: number): string),
---  y_text: (fun(v: number): string), label: string }
---@param marks string
---@return string
function svg.chart(c, marks)
  local m, parts = svg.MARGIN, {}
  local right, bottom = c.width - m.right, c.height - m.bottom
  for _, tick in ipairs(c.y.ticks) do
    parts[#parts + 1] = svg.line(m.left, tick.at, right, tick.at, "grid")
    parts[#parts + 1] = svg.text(m.left - 8, tick.at + 4, c.y_text(tick.value), "tick", "end")
  end
  for _, tick in ipairs(c.x.ticks) do
    parts[#parts + 1] = svg.line(tick.at, m.top, tick.at, bottom, "grid")
    parts[#parts + 1] = svg.text(tick.at, bottom + 18, c.x_text(tick.value), "tick", "middle")
  end
  parts[#parts + 1] = svg.line(m.left, bottom, right, bottom, "axis")
  parts[#parts + 1] = svg.text((m.left + right) / 2, c.height - 6, c.x_label, "name", "middle")
  parts[#parts + 1] = ('<text class="name" text-anchor="middle" transform="translate(14 %s) '
    .. 'rotate(-90)">%s</text>'):format(coordinate((m.top + bottom) / 2), svg.escape(c.y_label))
  parts[#parts + 1] = marks
  return svg.picture(c.width, c.height, c.label, table.concat(parts, "\n"))
end

-- What letters of 12 pixels take; names are mostly small letters and digits.
local LETTER <const>, LINE <const> = 6.4, 13

local function overlaps(a, b)
  return a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
end

---Names beside points { x, y, name }, each on the side where it covers least.
---@param box number[] left, top, right, bottom of the room there is
---@return string
function svg.names(points, box, class)
  local taken, parts = {}, {}
  for _, p in ipairs(points) do
    taken[#taken + 1] = { p[1] - 5, p[2] - 5, p[1] + 5, p[2] + 5 }
  end
  for _, p in ipairs(points) do
    local width = LETTER * (utf8.len(p[3]) or #p[3])
    local best, least
    for _, place in ipairs { { 9, 4, "start" }, { -9, 4, "end" }, { 0, -9, "middle" },
      { 0, 18, "middle" }, { 9, -8, "start" }, { 9, 16, "start" }, { -9, -8, "end" },
      { -9, 16, "end" } } do
      local x, y = p[1] + place[1], p[2] + place[2]
      local left = place[3] == "start" and x or place[3] == "end" and x - width or x - width / 2
      local area = { left, y - LINE + 3, left + width, y + 3 }
      local cost = (area[1] < box[1] or area[3] > box[3]) and 10 or 0
      if area[2] < box[2] or area[4] > box[4] then cost = cost + 10 end
      for _, other in ipairs(taken) do
        if overlaps(area, other) then cost = cost + 1 end
      end
      if not least or cost < least then best, least = { x, y, place[3], area }, cost end
    end
    taken[#taken + 1] = best[4]
    parts[#parts + 1] = svg.text(best[1], best[2], p[3], class, best[3])
  end
  return table.concat(parts, "\n")
end

return svg
