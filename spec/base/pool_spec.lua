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

  it("leaves out what nobody has begun when a flag is raised, and all loops behind it", function()
    for threads = 1, 4 do
      for _, look in ipairs { 1, 2, 40, 64, 65, 150, 192 } do
        local counts, is_cut = core.pool_counts(threads, 64, 1, 3, look)
        local n, most = 0, 0
        for i = 1, #counts do
          n = n + counts:byte(i)
          most = math.max(most, counts:byte(i))
        end
        assert.is_true(is_cut)
        assert.is_true(n < look) -- a look before each piece, and one that was answered with yes
        if n < 64 then assert.is_true(most <= 1) end -- no later loop
        if threads == 1 then assert.equal(look - 1, n) end
      end
      local counts, is_cut = core.pool_counts(threads, 64, 1, 3, 1 << 20)
      assert.same({ ("\3"):rep(64), false }, { counts, is_cut })
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
