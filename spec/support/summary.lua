--- busted output handler: plain terminal, then one line "N passed, N failed" that CI reads.
return function(options)
  local handler = require "busted.outputHandlers.plainTerminal" (options)
  local subscribe = handler.subscribe

  function handler:subscribe(given)
    subscribe(self, given)
    require "busted".subscribe({ "suite", "end" }, function()
      local failed = self.failuresCount + self.errorsCount
      io.write(("%d passed, %d failed, %d skipped\n"):format(self.successesCount, failed,
        self.pendingsCount))
      io.flush()
      return nil, true
    end)
  end

  return handler
end
