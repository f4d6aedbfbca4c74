local clip = require "moonlet.clip"

describe("clip", function()
  it("leaves what fits and is UTF-8 alone", function()
    for _, text in ipairs { "", "a", "gr\u{FC}n \u{1F600}\n", ("x"):rep(100) } do
      assert.equal(text, clip.text(text, 100))
    end
  end)

  it("replaces each broken byte", function()
    assert.equal("a\u{FFFD}b", clip.valid("a\xFFb"))
    assert.equal("\u{FFFD}\u{FFFD}", clip.valid("\xE2\x82"))
    assert.equal("\u{FFFD}\u{FFFD}\u{FFFD}x", clip.valid("\xED\xA0\x80x")) -- a surrogate
    assert.equal("\u{20AC}\u{FFFD}", clip.valid("\u{20AC}\xC0"))
  end)

  it("keeps whole lines of beginning and end, and counts the rest", function()
    local lines = {}
    for i = 1, 100 do lines[i] = ("line %03d\n"):format(i) end
    local text = table.concat(lines) -- 900 bytes
    assert.equal("line 001\nline 002\n[... 864 of 900 bytes are left out here ...]\n"
      .. "line 099\nline 100\n", clip.text(text, 40))
  end)

  it("is the same for every cut of the text", function()
    local text = ("abc\ndef \u{20AC}\n"):rep(50)
    local whole = clip.text(text, 100)
    for _, step in ipairs { 1, 3, 7, 99, 101 } do
      local c = clip.new(100)
      for i = 1, #text, step do c:add(text:sub(i, i + step - 1)) end
      assert.equal(whole, c:text())
    end
  end)

  it("cuts a text without lines inside", function()
    local cut = clip.text(("x"):rep(1000), 100)
    assert.equal(("x"):rep(50) .. "\n[... 900 of 1000 bytes are left out here ...]\n"
      .. ("x"):rep(50), cut)
  end)

  it("holds no more than it has to", function()
    local c = clip.new(1000)
    for _ = 1, 1000 do c:add(("y"):rep(1000)) end
    assert.is_true(#table.concat(c.tail) <= 2000)
    assert.matches("999000 of 1000000", c:text())
  end)
end)
