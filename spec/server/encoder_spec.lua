-- Long texts are tokenized while everything else goes on.

local encoder = require "moonlet.server.encoder"
local model_of = require "moonlet.model"
local sched = require "moonlet.sched"
local served = require "spec.support.served"
local tokenizer = require "moonlet.tokenizer"

local LONG <const> = ("One two <|im_end|> three, été 🙂.\n"):rep(40000)

local function ids_of(list)
  local ids = tokenizer.new_ids()
  ids:append(list)
  return ids
end

describe("the server's encoder", function()
  local model, loop
  setup(function() model = assert(model_of.open_texts(served.DIR)) end)
  teardown(function() model:close() end)
  before_each(function() loop = assert(sched.open()) end)
  after_each(function() loop:close() end)

  it("gives way to others, and encodes as the model does", function()
    local encode, turns, n_open, results = encoder.new(model, loop), 0, 3, {}
    local function one(i, text, plain)
      results[i] = assert(encode(text, plain)):slice()
      n_open = n_open - 1
    end
    loop:spawn(one, 1, LONG)
    loop:spawn(one, 2, LONG .. "x", ids_of { 1, #LONG })
    loop:spawn(one, 3, "short", ids_of { 1, 5 })
    loop:spawn(function()
      while n_open > 0 do
        turns = turns + 1
        loop:sleep(0)
      end
      loop:stop()
    end)
    assert(loop:run())
    assert.is_true(turns >= 2) -- it had its turn while both long ones were going on
    assert.same(model:encode(LONG), results[1])
    assert.same(model:encode(LONG .. "x", { plain = { { 1, #LONG } } }), results[2])
    assert.same(model:encode("short"), results[3])
  end)

  it("lets only so many long texts wait", function()
    local encode, n_done, refused = encoder.new(model, loop), 0, {}
    for _ = 1, 66 do -- one is worked on, 64 wait
      loop:spawn(function()
        local ids, message, code = encode(LONG:sub(1, 1 << 15))
        if not ids then refused[#refused + 1] = { message, code } end
        n_done = n_done + 1
        if n_done == 66 then loop:stop() end
      end)
    end
    assert(loop:run())
    assert.same({ { "too many long texts wait; try again", "busy" } }, refused)
  end)

  it("serves those who compute gently, at whatever instruction they give way", function()
    local text, n_at_once, most = ("x"):rep(1 << 15), 0, 0
    local encoding = setmetatable({ fd = function() end, result = function() return "ids" end },
      { __close = function() end })
    local texts = { tokenizer = { start = function() return encoding end } }
    local turns = { signal = function() return loop:signal() end, ready = function()
      n_at_once = n_at_once + 1
      most = math.max(most, n_at_once)
      coroutine.yield() -- others have one turn meanwhile
      n_at_once = n_at_once - 1
    end }
    loop.turn_seconds = 0
    for n_steps = 0, 260 do
      local encode, n_open, n_rounds = encoder.new(texts, turns), 3, 0
      local function one(i)
        for _ = 1, i * n_steps do end -- luacheck: ignore 542
        local ids = encode(text)
        assert.equal("ids", ids)
        n_open = n_open - 1
      end
      for i = 0, 2 do loop:spawn(loop.gently, loop, one, math.min(i, 1)) end
      loop:spawn(function()
        while n_open > 0 and n_rounds < 100 do
          loop:sleep(0)
          n_rounds = n_rounds + 1
        end
        loop:stop()
      end)
      assert(loop:run())
      assert.equal(0, n_open, n_steps) -- nobody waits for nobody
    end
    assert.equal(1, most)
  end)

  it("gives way between many short texts", function()
    local encode, turns, is_done = encoder.new(model, loop), 0, false
    loop:spawn(function()
      for _ = 1, 100 do encode(LONG:sub(1, 4096)) end
      is_done = true
    end)
    loop:spawn(function()
      while not is_done do
        turns = turns + 1
        loop:sleep(0)
      end
      loop:stop()
    end)
    assert(loop:run())
    assert.is_true(turns >= 12, tostring(turns))
  end)

  it("survives what is closed meanwhile", function()
    local closed = assert(tokenizer.open(served.DIR))
    local encoding = assert(closed:start(LONG, { plain = { { 1, 100 } } }))
    closed:close()
    assert.error(function() closed:encode("x") end)
    assert.same(model:encode(LONG, { plain = { { 1, 100 } } }), (assert(encoding:result())))
    assert.error(function() encoding:fd() end)
    encoding:close()
    assert.same({}, encoding:result())
    local other = assert(tokenizer.open(served.DIR))
    other:start(LONG):close()
    assert(other:start(LONG))
    other:close() -- the collector has the encoding
    collectgarbage()
  end)
end)
