local core = require "moonlet.core"

describe("a pool", function()
  it("hands out every item exactly once per loop", function()
    for threads = 1, 6 do
      for _, items in ipairs { 0, 1, 2, 63, 64, 1000 } do
        for _, grain in ipairs { 0, 1, 7, 64, 5000 } do
          local counts = assert(core.pool_counts(threads, items, grain, 20))
          assert.equal(("\20"):rep(items), counts)
        end
      end
    end
  end)

  it("survives thousands of short loops", function()
    assert.equal(("\136"):rep(40), (core.pool_counts(4, 40, 3, 5000))) -- 5000 mod 256
  end)

  it("takes more threads than there are processors, and than there are items", function()
    for _, items in ipairs { 2, 63, 64, 65, 3000 } do
      assert.equal(("\20"):rep(items), (core.pool_counts(300, items, 1, 20)))
    end
  end)

  it("refuses numbers of threads that make no sense", function()
    for _, threads in ipairs { 0, -1, 1025 } do
      local counts, message, code = core.pool_counts(threads, 1, 1, 1)
      assert.is_nil(counts)
      assert.equal(("threads: %d is not between 1 and 1024"):format(threads), message)
      assert.equal("range", code)
    end
  end)
end)
