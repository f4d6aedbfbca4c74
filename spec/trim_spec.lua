local trim = require "moonlet.trim"

describe("trim", function()
  it("takes white space from the ends", function()
    for given, both in pairs { [""] = "", [" "] = "", ["\n a b\t\r"] = "a b", a = "a",
      [" a"] = "a", ["a  "] = "a", ["\0 "] = "\0" } do
      assert.equal(both, trim.both(given))
    end
    for given, right in pairs { [""] = "", ["  "] = "", [" a b \n"] = " a b" } do
      assert.equal(right, trim.right(given))
    end
  end)

  it("takes what %s is", function()
    local texts = { "", "\n a\tb \v\f\r", "\u{a0}a\u{a0}", "  " }
    for c = 0, 255 do texts[#texts + 1] = "x" .. string.char(c) end
    for _, text in ipairs(texts) do
      assert.equal(text:match("^%s*(.-)%s*$"), trim.both(text))
      assert.same({ text:match("^(.-)(%s*)$") }, { trim.split(text) })
    end
  end)

  it("takes no longer for much white space inside", function()
    local spaces = (" "):rep(1 << 22) -- its square is more than a day
    assert.equal("a" .. spaces .. "b", trim.both(spaces .. "a" .. spaces .. "b"))
    assert.equal("", trim.both(spaces))
    assert.equal("", trim.right(spaces))
    assert.equal(spaces .. "a", trim.right(spaces .. "a" .. spaces))
  end)
end)
