-- Renders our conversations through published chat templates and compares byte for byte with
-- jinja2 in transformers' environment. Needs $MOONLET_ORACLE with venv (transformers, jinja2) and
-- templates (spec/oracle/templates.sh).

local jinja = require "moonlet.jinja"
local json = require "moonlet.json"

local CONVERSATIONS = "spec/golden/jinja/conversations.json"
local QWEN = { "Qwen3.5-4B.jinja", "qwen3_5_nothink.jinja", "qwen3_6.jinja", "Qwen3-Coder.jinja",
  "Qwen-Qwen3-0.6B.jinja" }

local function oracle()
  return assert(os.getenv("MOONLET_ORACLE"), "MOONLET_ORACLE is not set")
end

-- Calls check(row) for every rendering of the reference; their number by template.
local function each_row(check)
  local command = ("%s/venv/bin/python spec/oracle/render_templates.py %s %s/templates")
    :format(oracle(), CONVERSATIONS, oracle())
  local process, counts = assert(io.popen(command)), {}
  for line in process:lines() do
    local row = assert(json.decode(line))
    counts[row.template] = (counts[row.template] or 0) + 1
    check(row)
  end
  assert(process:close(), command)
  return counts
end

local compiled = {}

local function compile(name)
  if not compiled[name] then
    local file = assert(io.open(oracle() .. "/templates/" .. name, "rb"))
    compiled[name] = assert(jinja.compile(file:read("a"), { name = name }))
    file:close()
  end
  return compiled[name]
end

-- How our result differs from a row, or nil.
local function difference(row)
  local text, message, _, detail = compile(row.template):render(row.context)
  if row.output then
    if text == row.output then return nil end
    return text and "other text" or message
  end
  if not text and detail.kind == row.error
    and (row.error ~= "TemplateError" or message == row.message) then
    return nil
  end
  return ("%s instead of %s: %s"):format(text and "text" or message, row.error, row.message)
end

describe("published chat templates #oracle", function()
  it("render as in transformers", function()
    local differences = {}
    local counts = each_row(function(row)
      local why = difference(row)
      if why then
        differences[#differences + 1] = ("%s %s: %s"):format(row.template, row.conversation, why)
      end
    end)
    for _, name in ipairs(QWEN) do assert.is_true((counts[name] or 0) > 200, name) end
    assert.same({}, differences)
  end)
end)
