--- The HTTP server of moonlet.core in this process, against raw clients: bash's /dev/tcp, so that
--- every byte on the wire is known.

local client = require "spec.support.client"
local core = require "moonlet.core"

local raw = { CLOSE = "Connection: close\\r\\n", READ_ALL = client.READ_ALL }

-- What sends a request, for a script.
function raw.get(path, extra)
  return ("printf 'GET %s HTTP/1.1\\r\\nHost: x\\r\\n%s\\r\\n' >&3"):format(path, extra or "")
end

function raw.open(limits)
  local net = assert(core.net_open(limits or {}))
  return net, assert(net:listen("127.0.0.1", 0))
end

-- Serves until the client has ended; returns what it printed and the events seen.
function raw.serve(net, port, script, handle)
  local c, seen = client.start(port, script), {}
  while not c.is_done() do
    local kind, what = net:wait(0.05)
    if kind then seen[#seen + 1] = kind end
    if handle and kind then handle(kind, what) end
  end
  return c.output(), seen
end

-- A connection ends once its client has left and that was seen.
function raw.wait_for_none(net)
  while net:n_connections() > 0 do net:wait(0.05) end
end

-- Something to wait for in a script, and what makes it happen; `finally` is busted's.
function raw.event(finally)
  local mark = os.tmpname()
  os.remove(mark)
  finally(function() os.remove(mark) end)
  return "until [ -e " .. mark .. " ]; do sleep 0.01; done",
    function() assert(io.open(mark, "w")):close() end
end

return raw
