--- The page around a report: one HTML file that needs nothing else, for light and dark screens.
local svg = require "moonlet.eval.svg"

local page = {}

---How many series have colours of their own.
page.SERIES = 8

local STYLE <const> = [[
:root { color-scheme: light dark; --back: #fbfaf8; --card: #ffffff; --ink: #1d232b;
  --soft: #5c6672; --rule: #dfe3e8; --grid: #eceef1; --none: #e4e7eb;
  --s1: #2467b3; --s2: #c8501e; --s3: #21805a; --s4: #8a4bb0; --s5: #b8860b; --s6: #c2366f;
  --s7: #3a8c9e; --s8: #6d6d6d; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1b1f25; --ink: #e4e8ee;
  --soft: #98a3b0; --rule: #343b45; --grid: #282e36; --none: #2b313a;
  --s1: #6fa8e8; --s2: #f08a5d; --s3: #5bbf95; --s4: #c493e6; --s5: #e0b94f; --s6: #f07fae;
  --s7: #73c3d4; --s8: #a8a8a8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 2px; }
p { margin: 0 0 14px; color: var(--soft); max-width: 75ch; }
section > figure, .wide { background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: 16px; margin: 12px 0; overflow-x: auto; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 8px; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans",
  sans-serif; fill: var(--ink); }
svg .tick, svg .name, svg .row { fill: var(--soft); }
svg .mark { paint-order: stroke; stroke: var(--card); stroke-width: 3px;
  stroke-linejoin: round; }
svg .again { stroke-dasharray: 6 3; } .key .again { opacity: 0.55; }
svg .cell { font-size: 10.5px; fill: #ffffff; } svg .cell.dark { fill: #1d232b; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--rule); }
svg .frontier { stroke: var(--soft); stroke-dasharray: 3 4; fill: none; }
svg .none { fill: var(--none); } svg .curve { fill: none; stroke-width: 1.8; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 13.5px; }
th { font-weight: 500; color: var(--soft); text-align: right; padding: 4px 10px;
  border-bottom: 1px solid var(--rule); white-space: nowrap; }
td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th.t, td.t { text-align: left; } tr:last-child td { border-bottom: 0; }
td.t { max-width: 320px; overflow: hidden; text-overflow: ellipsis; }
tr.sum td { font-weight: 600; border-top: 1px solid var(--rule); }
.bar { display: inline-block; height: 9px; border-radius: 2px; background: var(--s1);
  vertical-align: 0; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft);
  margin: 0 0 8px; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px;
  margin-right: 6px; vertical-align: -1px; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
]]

-- Marks of each series: filled, as curve, as key.
local function series_style()
  local parts = {}
  for i = 1, page.SERIES do
    parts[i] = ("svg .s%d { fill: var(--s%d); } svg .curve.s%d { fill: none; stroke: var(--s%d); }"
      .. " svg .error.s%d { stroke: var(--s%d); } .key .s%d { background: var(--s%d); }\n"):format(
      i, i, i, i, i, i, i, i)
  end
  return table.concat(parts)
end

---The class of a series; colours repeat when there are many, their curves dashed.
function page.series(i)
  return ("s%d"):format((i - 1) % page.SERIES + 1) .. (i > page.SERIES and " again" or "")
end

---A heading, a sentence and what belongs to it.
function page.section(title, text, content)
  return ("<section>\n<h2>%s</h2>\n<p>%s</p>\n%s\n</section>"):format(svg.escape(title),
    svg.escape(text), content)
end

---@param title? string
function page.figure(content, title)
  local head = title and ("<h3>%s</h3>\n"):format(svg.escape(title)) or ""
  return ("<figure>\n%s%s\n</figure>"):format(head, content)
end

---Names of series with their colours.
---@param names string[]
function page.key(names)
  local parts = {}
  for i, name in ipairs(names) do
    parts[i] = ('<span><i class="%s"></i>%s</span>'):format(page.series(i), svg.escape(name))
  end
  return ('<div class="key">%s</div>'):format(table.concat(parts))
end

---What colours mean.
---@param swatches { colour: string, text: string }[]
function page.legend(swatches)
  local parts = {}
  for i, s in ipairs(swatches) do
    parts[i] = ('<span><i style="background:%s"></i>%s</span>'):format(s.colour,
      svg.escape(s.text))
  end
  return ('<div class="key">%s</div>'):format(table.concat(parts))
end

---A table; cells are text, or { html = ... }.
---@param head string[] names of columns; those that begin with "<" are aligned left
---@param lines { [integer]: string|table, class: string? }[]
function page.table(head, lines)
  local parts = { '<div class="wide"><table>\n<tr>' }
  local left = {}
  for i, name in ipairs(head) do
    left[i] = name:find("^<") and ' class="t"' or ""
    parts[#parts + 1] = ("<th%s>%s</th>"):format(left[i], svg.escape((name:gsub("^<", ""))))
  end
  parts[#parts + 1] = "</tr>\n"
  for _, line in ipairs(lines) do
    parts[#parts + 1] = line.class and ('<tr class="%s">'):format(line.class) or "<tr>"
    for i = 1, #head do
      local cell = line[i] or ""
      parts[#parts + 1] = ("<td%s>%s</td>"):format(left[i], type(cell) == "table" and cell.html
        or svg.escape(cell))
    end
    parts[#parts + 1] = "</tr>\n"
  end
  parts[#parts + 1] = "</table></div>"
  return table.concat(parts)
end

---@param title string
---@param subtitle string
---@param sections string[]
---@param foot string
function page.html(title, subtitle, sections, foot)
  return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta '
    .. 'name="viewport" content="width=device-width, initial-scale=1">\n<title>%s</title>\n'
    .. "<style>\n%s%s</style>\n</head>\n<body>\n<main>\n<h1>%s</h1>\n<p>%s</p>\n%s\n"
    .. "<footer>%s</footer>\n</main>\n</body>\n</html>\n"):format(svg.escape(title), STYLE,
    series_style(), svg.escape(title), svg.escape(subtitle), table.concat(sections, "\n"),
    svg.escape(foot))
end

return page
