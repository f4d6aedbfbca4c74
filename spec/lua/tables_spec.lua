local core = require "moonlet.core"

local DIR = "spec/golden/models/moe-text/hf"

---A table whose length Lua takes to be about 2^62, from the few entries that it looks at: all of
---them are in its hash, where the search for an end doubles its steps.
local function endless(value)
  local keys = {}
  for k = 0, 62 do keys[#keys + 1] = ("[%d] = ..."):format(1 << k) end
  return assert(load("return { " .. table.concat(keys, ", ") .. " }"))(value)
end

describe("a table given to the core", function()
  local model, session

  before_each(function()
    model = assert(core.model_open(DIR, { threads = 1 }))
    session = assert(model:session { ctx = 8 })
  end)

  after_each(function()
    session:close()
    model:close()
  end)

  it("has an end", function()
    local ids = endless(1)
    assert.is_true(#ids > 1 << 40)
    for _, call in ipairs {
      function() session:eval(ids) end,
      function() session:score({}, ids) end,
      function() session:reusable(ids) end,
      function() session:mtp(0, "", ids) end,
      function() model:forward(ids, {}) end,
      function() core.st_write(os.tmpname(), endless {}) end,
    } do
      assert.error_matches(call, "a table of more than %d+ entries")
    end
    assert.error_matches(function() core.tensor("f32", ids, "") end, "dimensions expected")
  end)

  it("is read as it is, whatever its metatable says", function()
    local function close() session:close() end
    local t = setmetatable({ 1, 2 }, { __len = function() close() return 1 << 62 end,
      __index = function() close() return 1 end })
    assert.is_true(session:eval(t))
    assert.same({ 1, 2 }, session:ids())
    assert.error_matches(function() session:eval { 1, nil, 3 } end, "is not a token id")
  end)
end)

describe("a handle that a finalizer closes", function()
  it("is looked at after the arguments were read", function()
    local model <close> = assert(core.model_open(DIR, { threads = 1 }))
    local ids = {}
    for i = 1, 4096 do ids[i] = i % 256 end -- garbage in every call, and too many to evaluate
    for _ = 1, 20 do
      local session = assert(model:session { ctx = 8 })
      for _ = 1, 20 do setmetatable({}, { __gc = function() session:close() end }) end
      local ok, message
      repeat ok, message = pcall(session.eval, session, ids) until not ok
      assert.matches("closed session", message)
    end
  end)
end)
