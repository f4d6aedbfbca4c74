-- Reads the golden vectors (spec/golden/text/README.md) and compares a tokenizer with them.
local json = require "moonlet.json"

local vectors = {}

function vectors.rows(name)
  local rows = {}
  for line in io.lines("spec/golden/text/" .. name .. ".jsonl") do
    rows[#rows + 1] = assert(json.decode(line, { name = name }))
  end
  return rows
end

local function ids_text(ids)
  return table.concat(ids, " ")
end

-- Each check returns how many rows it compared, and a line for each row that differs.
local function check(file, differ)
  local bad, rows = {}, vectors.rows(file)
  for _, row in ipairs(rows) do
    local got, want = differ(row)
    if got ~= want then bad[#bad + 1] = ("%s: %q, expected %q"):format(row.name, got, want) end
  end
  return #rows, bad
end

function vectors.encode(tok, key, name)
  return check((name or "encode") .. "-" .. key, function(row)
    return ids_text(tok:encode(row.text)), ids_text(row.ids)
  end)
end

function vectors.split(tok)
  return check("split", function(row)
    local pieces = tok:split(row.text)
    return table.concat(pieces) .. "\0|" .. table.concat(pieces, "\0|"),
      row.nfc .. "\0|" .. table.concat(row.pieces, "\0|")
  end)
end

function vectors.decode(tok, key)
  return check("decode-" .. key, function(row)
    return tok:decode(row.ids, { skip_special = row.skip_special }), row.text
  end)
end

function vectors.stream(tok, key)
  return check("stream-" .. key, function(row)
    local stream <close> = tok:stream { skip_special = row.skip_special }
    local steps = {}
    for i, id in ipairs(row.ids) do steps[i] = assert(stream:step(id)) end
    steps[#steps + 1] = stream:finish()
    row.steps[#row.steps + 1] = row["end"]
    return table.concat(steps, "|"), table.concat(row.steps, "|")
  end)
end

function vectors.broken_utf8(tok, key)
  return check("broken-utf8-" .. key, function(row)
    local bytes = row.bytes:gsub("%x%x", function(x) return string.char(tonumber(x, 16)) end)
    return ids_text(tok:encode(bytes)), ids_text(row.ids)
  end)
end

return vectors
