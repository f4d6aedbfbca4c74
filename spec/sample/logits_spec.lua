local core = require "moonlet.core"
local ordered = require "spec.support.order"

local inf, nan = math.huge, 0 / 0

local function view(values)
  local bytes = string.pack("<" .. ("f"):rep(#values), table.unpack(values))
  return core.tensor("f32", { 1, #values }, bytes):row(1)
end

describe("logits", function()
  it("finds the largest, the lowest id of equal ones", function()
    assert.equal(2, view{ 1, -2, 3, 3, 0 }:argmax())
    assert.equal(1, view{ -inf, -3, -inf }:argmax())
    assert.equal(5, #view{ 1, -2, 3, 3, 0 })
  end)

  it("lists the k best in order, equal ones by id", function()
    local ids, values = view{ 1, 5, 3, 5, -inf, 4 }:topk(4)
    assert.same({ 1, 3, 5, 2 }, ids)
    assert.same({ 5.0, 5.0, 4.0, 3.0 }, values)
    assert.same({ 1, 3, 5, 2, 0 }, (view{ 1, 5, 3, 5, -inf, 4 }:topk(100)))
  end)

  it("agrees with a full sort", function()
    local values, order = ordered(7, 900, 60, 4)
    for _, k in ipairs{ 1, 2, 3, 17, 64, 450, 899, 900 } do
      assert.same(table.move(order, 1, k, 1, {}), (view(values):topk(k)))
    end
  end)

  it("gives probabilities and entropy", function()
    local v = view{ math.log(1), math.log(2), math.log(5), -inf }
    assert.near(math.log(1 / 8), v:logprob(0), 1e-6)
    assert.near(math.log(5 / 8), v:logprob(2), 1e-6)
    assert.equal(-inf, v:logprob(3))
    local h = -(math.log(1 / 8) / 8 + math.log(2 / 8) * 2 / 8 + math.log(5 / 8) * 5 / 8)
    assert.near(h, v:entropy(), 1e-6)
    assert.near(math.log(4), view{ 2, 2, 2, 2 }:entropy(), 1e-6)
    assert.equal(0.0, view{ 7 }:entropy())
  end)

  it("bears the largest floats", function()
    local big = 3.4028234663852886e38
    local v = view{ big, -big, big }
    assert.near(math.log(0.5), v:logprob(0), 1e-6)
    assert.equal(-2 * big, v:logprob(1))
    assert.near(math.log(2), v:entropy(), 1e-6)
  end)

  it("names the first NaN or +inf instead of answering", function()
    for _, ask in ipairs{ "argmax", "topk", "logprob", "entropy" } do
      local v, message, code = (function(x) return x[ask](x, 1) end)(view{ 0, 1, nan, nan })
      assert.is_nil(v)
      assert.equal("logits are NaN at id 2", message)
      assert.equal("range", code)
    end
    local _, message = view{ 0, inf }:argmax()
    assert.equal("logits are +inf at id 1", message)
    _, message = view{ -inf, -inf }:entropy()
    assert.equal("no token is left: all logits are -inf", message)
    _, message = view{ }:argmax()
    assert.equal("no logits", message)
  end)

  it("can be changed in place, call after call", function()
    local v = view{ 0, 1, 2, 3 }
    assert.equal(v, v:scale(0.5):bias{ [0] = 9, [3] = -inf })
    assert.equal(9.0, v:get(0))
    assert.equal(0.5, v:get(1))
    assert.equal(-inf, v:get(3))
    assert.equal(1, v:ban{ 0, 2 }:argmax())
    assert.equal(3, view{ 0, 1, 2, 3 }:mask{ 0, 3 }:argmax())
    assert.same({ 0, 3 }, (view{ 3, 1, 9, 0, 2 }:ban(1, 2):ban(4):topk(5)))
  end)

  it("takes masks as bits, the lowest first", function()
    local values = {}
    for i = 1, 20 do values[i] = i end
    assert.same({ 8, 2, 0 }, (view(values):mask("\x05\x01"):topk(20)))
  end)

  it("changes nothing when a bias is wrong", function()
    local v = view{ 1, 2 }
    assert.error_matches(function() v:bias{ [0] = 1, [2] = 1 } end, "2 is not an id in 0..1")
    assert.error_matches(function() v:bias{ [0] = nan } end, "bias of id 0")
    assert.error_matches(function() v:bias{ [0] = "x" } end, "bias of id 0")
    assert.error_matches(function() v:bias{ a = 1 } end, "a is not an id")
    assert.equal(1.0, v:get(0))
  end)

  it("raises on ids and factors out of range", function()
    local v = view{ 1, 2 }
    assert.error_matches(function() v:logprob(2) end, "id 2 is not in 0..1")
    assert.error_matches(function() v:get(-1) end, "id %-1 is not in")
    assert.error_matches(function() v:ban{ 5 } end, "id 5 is not in")
    assert.error_matches(function() v:ban(0, 2) end, "id 2 is not in")
    assert.error_matches(function() v:scale(0) end, "positive")
    assert.error_matches(function() v:topk(0) end, "at least 1")
  end)
end)
