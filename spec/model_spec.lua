-- What a model takes from the small files beside its weights.
local checkpoint = require "spec.support.checkpoint"
local moonlet = require "moonlet"

local DIR <const> = "spec/golden/models/moe-wrapped/hf"

-- A copy of the checkpoint with these files besides, opened; nil, message, code as open does.
local function open(files, edit_config)
  local dir = checkpoint.edited(DIR, function(_, config)
    config = config:gsub('"eos_token_id": [^,\n}]*,?', "")
    return edit_config and edit_config(config) or config
  end)
  for name, text in pairs(files) do checkpoint.spit(dir .. "/" .. name, text) end
  local model, message, code = moonlet.open(dir, { threads = 1 })
  checkpoint.remove(dir) -- what is mapped stays
  return model, message, code
end

local function with_eos(eos)
  return function(config) return (config:gsub("^{", '{"eos_token_id": ' .. eos .. ",", 1)) end
end

describe("the ids that end a generation", function()
  for _, case in ipairs {
    { "a list in generation_config.json", '{"eos_token_id": [7, 9]}', "3", { 7, 9 } },
    { "one id there", '{"eos_token_id": 7}', "3", { 7 } },
    { "config.json's when it says null", '{"eos_token_id": null}', "3", { 3 } },
    { "config.json's when it says nothing", "{}", "[3, 4]", { 3, 4 } },
    { "config.json's when there is no such file", nil, "3", { 3 } },
    { "none at all", "{}", nil, {} },
  } do
    it("are " .. case[1], function()
      local model <close> = assert(open({ ["generation_config.json"] = case[2] },
        case[3] and with_eos(case[3])))
      assert.same(case[4], model.stop_ids)
    end)
  end

  it("may stand in text_config", function()
    local model <close> = assert(open({}, function(config)
      return (config:gsub('("text_config": {)', '%1 "eos_token_id": 5,', 1))
    end))
    assert.same({ 5 }, model.stop_ids)
  end)
end)

describe("a file beside the weights", function()
  it("is named when it is broken", function()
    for name, text in pairs {
      ["generation_config.json"] = "[]]", ["tokenizer.json"] = "{}",
      ["tokenizer_config.json"] = "[]", ["chat_template.jinja"] = "{% if %}",
    } do
      local model, message = open { [name] = text }
      assert.is_nil(model)
      assert.matches(name, message, 1, true)
    end
  end)

  it("that is there and cannot be read is no missing one", function()
    local dir = checkpoint.directory()
    os.execute("mkdir " .. dir .. "/chat_template.jinja")
    local template, message, code = require("moonlet.template").open(dir)
    checkpoint.remove(dir)
    assert.is_nil(template)
    assert.matches("chat_template.jinja: Is a directory", message, 1, true)
    assert.equal("io", code)
  end)
end)
