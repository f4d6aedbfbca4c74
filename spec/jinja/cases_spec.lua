local jinja = require "moonlet.jinja"
local json = require "moonlet.json"

-- What the renderer refuses by name instead of rendering.
local REFUSED = {
  ["lit-escapes-more"] = "\\N{...} escapes are not supported",
  ["num-bignum"] = "integers are limited to 64 bits",
}

local function render(case)
  local template, message, code, detail = jinja.compile(case.template)
  if not template then return nil, message, code, detail end
  return template:render(case.context)
end

local function check_failure(case, text, message, code, detail)
  assert.is_nil(text)
  assert.equal("template", code)
  if case.error == "TemplateError" then
    assert.equal(case.message, message)
  else
    assert.truthy(message:find("^template:%d+: ."), message)
    assert.is_nil(message:find("\n", 1, true))
    assert.equal(case.error, detail.kind)
  end
end

local function rows()
  local out = {}
  for _, name in ipairs({ "cases", "language" }) do
    for line in io.lines("spec/golden/jinja/" .. name .. ".jsonl") do
      out[#out + 1] = assert(json.decode(line))
    end
  end
  return out
end

describe("jinja renders as jinja2 does:", function()
  for _, case in ipairs(rows()) do
    it(case.tier .. " " .. case.name, function()
      local text, message, code, detail = render(case)
      if REFUSED[case.name] then
        assert.equal("rare", case.tier)
        assert.is_nil(text)
        assert.truthy(message:find(REFUSED[case.name], 1, true), message)
      elseif case.error then
        check_failure(case, text, message, code, detail)
      else
        assert.equal(case.output, text, message)
      end
    end)
  end
end)
