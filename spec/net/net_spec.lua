-- The HTTP server against a raw client: requests, replies, and the life of connections.
local core = require "moonlet.core"
local raw = require "spec.support.raw"

local client = require("spec.support.client").start

local get, CLOSE <const>, READ_ALL <const> = raw.get, raw.CLOSE, raw.READ_ALL

describe("net", function()
  local net, port

  local function open(limits) net, port = raw.open(limits) end
  local function serve(script, handle) return raw.serve(net, port, script, handle) end
  local function wait_for_none() raw.wait_for_none(net) end
  local function event() return raw.event(finally) end

  after_each(function() net:close() end)

  it("hands out a request as it was sent", function()
    open()
    local got = {}
    local out = serve([[printf 'POST /v1/x?a=b%%20c HTTP/1.1\r\nHost: h:1\r\nX-Key: v\r\n]]
      .. [[Content-Length: 5\r\nConnection: close\r\n\r\n\x00abc\n' >&3; cat <&3]],
      function(kind, r)
        if kind ~= "request" then return end
        got = { r:method(), r:target(), r:header("x-key"), r:header("none") or false, r:body(),
          r:peer() }
        r:reply(200, { ["Content-Type"] = "text/plain" }, "ok\0!")
        assert.is_true(r:is_over())
        assert.is_nil(r:method())
        assert.is_nil(r:body())
      end)
    assert.same({ "POST", "/v1/x?a=b%20c", "v", false, "\0abc\n", "127.0.0.1" }, got)
    assert.matches("^HTTP/1.1 200 OK\r\n", out)
    assert.matches("\r\nContent%-Length: 4\r\n", out)
    assert.matches("\r\n\r\nok\0!$", out)
  end)

  it("knows what clients have not taken yet", function()
    open { pending_bytes = 64 << 20 }
    local wait_sent, tell_sent = event()
    local function count_sent(kind, r)
      if kind ~= "request" then return end
      r:reply(200, {}, ("x"):rep(32 << 20)) -- more than the system takes
      assert.is_true(net:unsent() > 1 << 20)
      tell_sent()
    end
    assert.equal(0, net:unsent())
    local out = serve(get("/", CLOSE) .. "; " .. wait_sent .. "; cat <&3 | wc -c", count_sent)
    assert.is_true(tonumber(out) > 32 << 20)
    assert.equal(0, net:unsent())
  end)

  it("keeps a connection for the next request, and takes bodies in chunks", function()
    open()
    local n = 0
    local out = serve(get("/1") .. [[; head -c 40 <&3 >/dev/null; printf ]]
      .. [['POST /2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n]]
      .. [[\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n' >&3; cat <&3]],
      function(kind, r)
        if kind ~= "request" then return end
        n = n + 1
        r:reply(200, {}, n == 2 and r:body() or "first")
      end)
    assert.equal(2, n)
    assert.matches("\r\n\r\nabcde$", out)
  end)

  it("is no proxy, and takes nothing that would be meant for one", function()
    open()
    local out, seen = serve([[printf 'CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n]]
      .. [[GET / HTTP/1.1\r\nHost: x\r\n\r\n' | dd bs=4096 iflag=fullblock status=none >&3; ]]
      .. "cat <&3") -- in one piece: the reply closes the connection
    assert.matches("^HTTP/1.1 501 ", out)
    assert.matches("\nConnection: close\r\n", out)
    assert.equal(1, select(2, out:gsub("HTTP/1.1 ", "")))
    assert.same({}, seen)
  end)

  it("streams a reply in chunks", function()
    open()
    local out = serve(get("/", CLOSE) .. ";" .. READ_ALL, function(kind, r)
      if kind ~= "request" then return end
      r:start(200, { ["Content-Type"] = "text/event-stream" })
      assert(r:write("data: 1\n\n"))
      assert(r:write("data: 2\n\n"))
      r:finish()
      assert(r:write("late")) -- to a request that is over: nothing
    end)
    assert.matches("Transfer%-Encoding: chunked", out)
    assert.matches("\r\n\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n$", out)
  end)

  it("streams nothing to a HEAD, and reads the request behind it", function()
    open()
    local n = 0
    local out = serve("printf 'HEAD / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' >&3;"
      .. "read -r line <&3;" .. get("/", CLOSE) .. "; cat <&3", function(kind, r)
        if kind ~= "request" then return end
        n = n + 1
        if r:method() == "GET" then return r:reply(200, {}, "text") end
        r:start(200, {})
        while net:unsent() > 0 do net:wait(0.01) end
        r:finish()
      end)
    assert.equal(2, n)
    assert.matches("\r\n\r\ntext$", out)
  end)

  it("ends a stream to an old client that would keep the connection by closing it", function()
    open()
    local out = serve([[printf 'GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n' >&3; cat <&3]],
      function(kind, r)
        if kind ~= "request" then return end
        r:start(200, {})
        r:write("text")
        r:finish()
      end)
    assert.is_nil(out:find("Content%-Length") or out:find("keep%-alive"))
    assert.matches("\r\n\r\ntext$", out)
  end)

  it("answers old clients without chunks", function()
    open()
    local out = serve([[printf 'GET / HTTP/1.0\r\n\r\n' >&3; cat <&3]], function(kind, r)
      if kind ~= "request" then return end
      r:start(200, {})
      r:write("text")
      r:finish()
    end)
    assert.matches("\r\n\r\ntext$", out)
  end)

  it("notices a client that leaves while nothing is written", function()
    open()
    local request, half, gone
    local wait_request, tell_request = event()
    local c = client(port, ("%s; %s; exec 3>&-"):format(get("/"), wait_request))
    while not gone do
      local kind, r = net:wait(0.01)
      if kind == "request" then
        request = r
        tell_request()
      elseif kind == "half" then
        half = r
      elseif kind == "gone" then
        gone = r
      elseif half then
        half:probe() -- the first tells the client's system, a later one is told
      end
    end
    assert.equal(request, half)
    assert.equal(request, gone)
    assert.is_true(request:is_over())
    request:reply(200, {}, "nobody") -- harmless
    while net:n_connections() > 0 do net:wait(0.01) end
    while not c.is_done() do net:wait(0.01) end
    c.output()
  end)

  -- Bash closes both sides of a connection.
  it("answers a client that only sends no more", function()
    for _, reply in ipairs { function(r) r:reply(200, {}, "whole") end, function(r)
      r:start(200, {})
      r:probe() -- nothing: a stream is written to instead
      assert(r:write("wh"))
      for _ = 1, 5 do net:wait(0.01) end
      assert(r:write("ole"))
      for _ = 1, 5 do net:wait(0.01) end
      r:finish()
    end } do
      open()
      local c = client(port, ([[perl -MSocket -e '
        socket(my $s, PF_INET, SOCK_STREAM, 0);
        connect($s, pack_sockaddr_in(%d, inet_aton("127.0.0.1"))) or die;
        syswrite($s, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        shutdown($s, 1);
        print while <$s>']]):format(port))
      local seen, n_waits = {}, 0
      local half
      while not c.is_done() do
        local kind, r = net:wait(0.01)
        if kind then seen[#seen + 1] = kind end
        half = half or kind == "half" and r
        if half and not half:is_over() then
          n_waits = n_waits + 1
          if n_waits < 4 then half:probe() else reply(half) end
        end
      end
      assert.same({ "request", "half" }, seen)
      local out = c.output():gsub("\r", "")
      local n = select(2, out:gsub("HTTP/1.1 100 Continue\n\n", ""))
      assert.equal(3, n)
      assert.matches("HTTP/1.1 200 OK\n.*wh.*ole", out)
      net:close()
    end
    open()
  end)

  -- Reads the beginning of a stream, then does what `parting` says.
  local function begin_stream(parting)
    return client(port, ([[exec perl -MSocket -e '
      socket(my $s, PF_INET, SOCK_STREAM, 0);
      connect($s, pack_sockaddr_in(%d, inet_aton("127.0.0.1"))) or die;
      syswrite($s, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
      my $all = ""; sysread($s, $all, 9, length $all) until $all =~ /begin/;
      %s']]):format(port, parting))
  end

  it("gives a client the rest of a stream in which it stops to send", function()
    open()
    local c = begin_stream([[shutdown($s, 1); print while <$s>]])
    local seen = {}
    while not c.is_done() do
      local kind, r = net:wait(0.05)
      if kind then seen[#seen + 1] = kind end
      if kind == "request" then
        r:start(200, {})
        assert(r:write("begin"))
      elseif kind == "half" then
        assert(r:write("more"))
        for _ = 1, 3 do net:wait(0.01) end
        assert(r:write("end"))
        r:finish()
      end
    end
    assert.same({ "request", "half" }, seen)
    assert.matches("4\r\nmore\r\n3\r\nend\r\n0\r\n\r\n$", c.output())
    wait_for_none()
  end)

  it("notices a client that leaves in a stream by what is written", function()
    open()
    local c = begin_stream("close($s)")
    local half, gone
    while not gone do
      local kind, r = net:wait(0.01)
      if kind == "request" then
        r:start(200, {})
        assert(r:write("begin"))
      elseif kind == "half" then
        half = r
      elseif kind == "gone" then
        gone = r
      elseif half then
        half:write(":\n")
      end
    end
    assert.equal(half, gone)
    while not c.is_done() do net:wait(0.05) end
    c.output()
    wait_for_none()
  end)

  it("sends 100-continue when asked", function()
    open()
    local out = serve([[printf 'POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n]]
      .. [[Content-Length: 2\r\nConnection: close\r\n\r\n' >&3; ]]
      .. [[head -c 12 <&3; printf hi >&3; cat <&3]],
      function(kind, r) if kind == "request" then r:reply(200, {}, r:body()) end end)
    assert.matches("^HTTP/1.1 100 ", out)
    assert.matches("hi$", out)
  end)

  it("answers requests that come at once one after the other, whatever their minor version",
  function()
    open()
    local targets = {}
    local out = serve([[printf 'GET /1 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc]]
      .. [[HEAD /2 HTTP/1.1\r\nHost: x\r\n\r\nGET /3 HTTP/1.7\r\nHost: x\r\n]]
      .. [[Connection: close\r\n\r\n' >&3; cat <&3]], function(kind, r)
        if kind ~= "request" then return end
        targets[#targets + 1] = r:target()
        r:reply(200, {}, r:method() == "HEAD" and "" or "ok")
      end)
    assert.same({ "/1", "/2", "/3" }, targets)
    local _, n = out:gsub("HTTP/1.1 200 OK\r\n", "")
    assert.equal(3, n)
    assert.matches("\r\n\r\nok$", out)
  end)

  it("closes the connection where a client asks for that among other things", function()
    open()
    for _, options in ipairs { "TE, close", "keep-alive,CLOSE", ",x ,close," } do
      local out = serve(get("/", ("Connection: %s\\r\\n"):format(options)) .. ";" .. READ_ALL,
        function(kind, r) if kind == "request" then r:reply(200, {}, "") end end)
      assert.matches("\r\nConnection: close\r\n", out, options)
    end
  end)

  it("reads on behind a request that names a whole URI", function()
    open()
    local targets = {}
    serve(get("http://x/1") .. ";" .. get("/2", CLOSE) .. ";" .. READ_ALL, function(kind, r)
      if kind ~= "request" then return end
      targets[#targets + 1] = r:target()
      r:reply(200, {}, "")
    end)
    assert.same({ "http://x/1", "/2" }, targets)
  end)

  it("refuses a body that is too large behind a HEAD that was streamed", function()
    open { body_bytes = 1000 }
    local wait_sent, tell_sent = event()
    local out = serve("printf 'HEAD / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' >&3;" .. wait_sent
      .. "; printf 'POST / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 1001\\r\\n\\r\\n' >&3;"
      .. READ_ALL, function(kind, r)
        if kind ~= "request" then return end
        r:start(200, {})
        while net:unsent() > 0 do net:wait(0.01) end
        r:finish()
        tell_sent()
      end)
    assert.matches("HTTP/1.1 413 ", out)
  end)

  it("writes no body to a HEAD, whatever it is given", function()
    open()
    assert(net:set_error_form("text/x-error", "[", "]", "]"))
    local out = serve([[printf 'HEAD /1 HTTP/1.1\r\nHost: x\r\n\r\n]]
      .. [[HEAD / HTTP/1.1\r\n\r\n' >&3;]] .. READ_ALL, function(kind, r)
        if kind == "request" then r:reply(200, {}, "hello") end
      end)
    local first, second = out:match("^(HTTP/1.1 200 .-\r\n)\r\n(HTTP/1.1 400 .-\r\n)\r\n$")
    assert.is_string(second, out)
    assert.matches("\nContent%-Length: 5\r\n", first)
    local length = #"[Host: the header field is missing]"
    assert.matches(("\nContent%%-Length: %d\r\n"):format(length), second)
  end)

  it("says of a status what the standard does", function()
    for status, phrase in pairs { [429] = "Too Many Requests", [422] = "Unprocessable Content",
      [503] = "Service Unavailable" } do
      open()
      local out = serve(get("/", CLOSE) .. ";" .. READ_ALL, function(kind, r)
        if kind == "request" then r:reply(status, {}, "") end
      end)
      assert.equal(("HTTP/1.1 %d %s"):format(status, phrase), out:match("^[^\r]*"))
      net:close()
    end
    open()
  end)

  it("leaves with its client what that sends while it is answered", function()
    open { body_bytes = 1 << 20 }
    local c = client(port, [[exec perl -e '$SIG{PIPE} = "IGNORE"; open(my $s, "+<&=3") or die;
      syswrite($s, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); my ($n, $some) = (0, "x" x 65536);
      while ($n < 1 << 28) { my $w = syswrite($s, $some) or last; $n += $w } print $n']])
    local request
    for _ = 1, 100 do -- rounds in each of which all that is there is read
      local kind, r = net:wait(0.005)
      if kind == "request" then
        request = r
        r:start(200, {})
        r:write("x")
      end
    end
    request:close()
    while not c.is_done() do net:wait(0.05) end
    assert.is_true(tonumber(c.output()) < 1 << 26)
  end)

  it("drops clients that are slow to send, to read, or idle", function()
    open { request_seconds = 0.5, idle_seconds = 0.5, write_seconds = 0.5, pending_bytes = 1 << 30 }
    local wait_dropped, tell_dropped = event()
    for _, script in ipairs {
      "while printf 'GET' >&3; do sleep 0.1; done", -- until it is dropped
      READ_ALL,
      "printf 'POST / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 12582912\\r\\n\\r\\n' >&3;"
        .. READ_ALL, -- which it never sends
      get("/big") .. "; " .. wait_dropped,
    } do
      local c, was_there = client(port, script), false
      while not was_there or net:n_connections() > 0 do
        local kind, r = net:wait(0.05)
        was_there = was_there or net:n_connections() > 0
        if kind == "request" then
          r:start(200, {})
          for _ = 1, 20 do r:write(("x"):rep(1 << 20)) end
        end
      end
      tell_dropped()
      while not c.is_done() do os.execute("sleep 0.02") end
      c.output()
    end
  end)

  it("does not pile up what a client does not read", function()
    open { pending_bytes = 1 << 20 }
    local message
    local wait_noticed, tell_noticed = event()
    serve(get("/big") .. "; " .. wait_noticed, function(kind, r)
      if kind ~= "request" then return end
      r:start(200, {})
      for _ = 1, 100 do
        local ok, text = r:write(("x"):rep(1 << 18))
        if not ok then
          message = text
          break
        end
      end
      tell_noticed()
    end)
    assert.matches("the client does not read", message)
  end)

  it("accepts no more than it should, and again when one has gone", function()
    open { connections = 2 }
    local held = {}
    local a = client(port, get("/a") .. ";" .. READ_ALL)
    local b = client(port, get("/b") .. ";" .. READ_ALL)
    while #held < 2 do
      local kind, r = net:wait(0.05)
      if kind == "request" then held[#held + 1] = r end
    end
    local c = client(port, get("/c", CLOSE) .. ";" .. READ_ALL)
    for _ = 1, 6 do assert.is_nil((net:wait(0.05))) end
    held[1]:close() -- drops the connection
    local answered
    while not c.is_done() do
      local kind, r = net:wait(0.05)
      if kind == "request" then
        answered = r:target()
        r:reply(200, {}, "")
      end
    end
    assert.equal("/c", answered)
    net:close()
    while not (a.is_done() and b.is_done()) do os.execute("sleep 0.05") end
    for _, one in ipairs { a, b, c } do one.output() end
  end)

  it("closes idle connections for those that wait, the oldest first, no busy ones", function()
    open { connections = 3, grace_seconds = 1e-6 }
    local busy
    local wait_end, tell_end = event()
    local a = client(port, get("/busy") .. ";" .. READ_ALL)
    while not busy do
      local kind, r = net:wait(0.05)
      if kind == "request" then busy = r end
    end
    local function join(script)
      local one = client(port, script .. ":; " .. READ_ALL .. " & " .. wait_end)
      local n = net:n_connections()
      while n < 3 and net:n_connections() == n do net:wait(0.05) end
      return one
    end
    local idle, sending = join(""), join("printf 'GET / HT' >&3; ")
    assert.equal(3, net:n_connections())
    local order = {}
    for i = 1, 3 do -- the idle one, the one that has not sent its request, the first newcomer
      local c = client(port, get("/" .. i) .. ";" .. READ_ALL .. " & " .. wait_end)
      local answered
      while not answered do
        local kind, r = net:wait(0.05)
        if kind == "request" then
          answered = r:target()
          r:reply(200, {}, "")
        end
      end
      order[i] = { answered, c }
    end
    assert.same({ "/1", "/2", "/3" }, { order[1][1], order[2][1], order[3][1] })
    assert.is_false(busy:is_over())
    tell_end()
    net:close()
    for _, one in ipairs { a, idle, sending, order[1][2], order[2][2], order[3][2] } do
      while not one.is_done() do os.execute("sleep 0.05") end
      one.output()
    end
  end)

  it("names the address it cannot have", function()
    open()
    local got, message, code = net:listen("127.0.0.1", port)
    assert.is_nil(got)
    assert.equal("io", code)
    assert.matches("cannot listen at 127.0.0.1 port " .. port, message, 1, true)
  end)

  it("tells when a watched descriptor can be read", function()
    open()
    assert.is_nil((net:wait(0)))
    assert.error(function() net:watch("x") end)
    net:unwatch(99)
  end)

  it("refuses what cannot be watched, and prints nothing", function()
    open()
    local pipe = assert(io.popen(([[exec lua5.4 -e "package.cpath = '%s'
      local net = require('moonlet.core').net_open {}
      for _, fd in ipairs { 99999, -1, 0, 3 } do print(net:watch(fd)) end
      " </etc/passwd 3</etc 2>&1]]):format(package.cpath)))
    local told = pipe:read("a")
    pipe:close()
    local expected = {}
    for i, fd in ipairs { 99999, -1, 0, 3 } do
      expected[i] = ("nil\t%d cannot be waited for\tio\n"):format(fd)
    end
    assert.equal(table.concat(expected), told)
  end)

  it("watches as many descriptors as there are", function()
    open()
    local programs, seen, n_seen = {}, {}, 0
    for i = 1, 100 do
      programs[i] = assert(core.process_open({ "sleep", "1000" }, "/"))
      assert(net:watch(programs[i]:fd()))
    end
    for i = 1, 100, 2 do net:unwatch(programs[i]:fd()) end
    for _, p in ipairs(programs) do p:kill("KILL") end
    while n_seen < 50 do
      local kind, fd = net:wait()
      assert.equal("ready", kind)
      if not seen[fd] then n_seen = n_seen + 1 end
      seen[fd] = true
    end
    for i, p in ipairs(programs) do
      assert.equal(i % 2 == 0 and true or nil, seen[p:fd()])
      net:unwatch(p:fd())
      p:close()
    end
  end)

  it("tells signals from descriptors of the same number", function()
    open()
    local pipe = assert(io.popen(([[exec lua5.4 -e "package.cpath = '%s'
      local net = require('moonlet.core').net_open {}
      net:catch_signal('TERM')
      net:unwatch(15)
      os.execute('kill -TERM \$PPID')
      print(net:wait())" 2>&1]]):format(package.cpath)))
    assert.equal("signal\t15\n", pipe:read("a"))
    pipe:close()
  end)

  it("catches a signal once, also while nobody waits for it", function()
    local pipe = assert(io.popen(([[exec lua5.4 -e "package.cpath = '%s'
      local net = require('moonlet.core').net_open {}
      net:catch_signal('INT')
      for n = 1, 2 do
        io.popen('kill -INT \$PPID'):close()
        io.write(n)
        io.flush()
      end" 2>&1]]):format(package.cpath)))
    assert.equal("1", pipe:read("a"))
    pipe:close()
  end)

  it("raises when closed", function()
    open()
    net:close()
    net:close()
    assert.error_matches(function() net:wait(0) end, "closed net")
  end)
end)
