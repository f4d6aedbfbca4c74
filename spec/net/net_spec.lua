-- The HTTP server against a raw client: bash's /dev/tcp, so that every byte on the wire is known.
local core = require "moonlet.core"

local client = require("spec.support.client").start
local READ_ALL <const> = require("spec.support.client").READ_ALL

local function get(path, extra)
  return ("printf 'GET %s HTTP/1.1\\r\\nHost: x\\r\\n%s\\r\\n' >&3"):format(path, extra or "")
end

local CLOSE <const> = "Connection: close\\r\\n"

describe("net", function()
  local net, port

  local function open(limits)
    net = assert(core.net_open(limits or {}))
    port = assert(net:listen("127.0.0.1", 0))
  end

  after_each(function() net:close() end)

  -- Serves until the client has ended; returns what it printed and the events seen.
  local function serve(script, handle)
    local c, seen = client(port, script), {}
    while not c.is_done() do
      local kind, what = net:wait(0.05)
      if kind then seen[#seen + 1] = kind end
      if handle and kind then handle(kind, what) end
    end
    return c.output(), seen
  end

  -- A connection ends once its client has left and that was seen.
  local function wait_for_none()
    while net:n_connections() > 0 do net:wait(0.05) end
  end

  -- Something to wait for in a script, and what makes it happen.
  local function event()
    local mark = os.tmpname()
    os.remove(mark)
    finally(function() os.remove(mark) end)
    return "until [ -e " .. mark .. " ]; do sleep 0.01; done",
      function() assert(io.open(mark, "w")):close() end
  end

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

  it("refuses what a proxy in front of it could read differently, and closes", function()
    open()
    local function post(fields, body)
      return ("printf 'POST / HTTP/1.1\\r\\n%s\\r\\n%s' >&3;"):format(fields, body) .. READ_ALL
    end
    local hidden <const> = "GET /hidden HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"
    local host <const> = "Host: x\\r\\n"
    for _, script in ipairs {
      post(host .. "Content-Length: 0\\r\\nContent-Length: 33\\r\\n", hidden),
      post(host .. "Content-Length: 33\\r\\nContent-Length: 33\\r\\n", hidden),
      post(host .. "Content-Length: +5\\r\\n", "hello"),
      post(host .. "Content-Length: 5, 5\\r\\n", "hello"),
      post(host .. "Content-Length : 33\\r\\n", hidden),
      post(host .. "Transfer-Encoding: chunked\\r\\nContent-Length: 6\\r\\n",
        "0\\r\\n\\r\\n" .. hidden),
      post(host .. "Transfer-Encoding: chunked\\r\\nTransfer-Encoding: identity\\r\\n",
        "0\\r\\n\\r\\n" .. hidden),
      post(host .. "Transfer-Encoding: identity, chunked\\r\\n", "0\\r\\n\\r\\n" .. hidden),
      post(host .. "Transfer-Encoding: xchunked\\r\\nContent-Length: 0\\r\\n", hidden),
      post("Content-Length: 0\\r\\n", hidden),
      post(host .. "Content-Length:\\r\\n 33\\r\\n", hidden),
      post(host .. "Content-Length: 0\\r\\n\\t33\\r\\n", hidden),
      post(host .. "X: y\\r\\n Content-Length: 33\\r\\n", hidden),
      post(" " .. host .. "Content-Length: 33\\r\\n", hidden),
      (post(host .. "Content-Length: 33\\r\\n", hidden):gsub("POST", "HEAD")),
      (post(host .. "Transfer-Encoding: chunked\\r\\n", hidden):gsub("POST", "TRACE")),
      (post(host .. "Transfer-Encoding: chunked\\r\\n", "0\\r\\n\\r\\n"):gsub("1.1", "1.0")),
      post(host .. "Host: y\\r\\nContent-Length: 0\\r\\n", hidden),
      post(host .. "Origin: http://a\\r\\nOrigin: http://b\\r\\nContent-Length: 0\\r\\n", hidden),
      post(host .. "Transfer-Encoding: chunked\\r\\n",
        "-5\\r\\nhello\\r\\n0\\r\\n\\r\\n" .. hidden),
    } do
      local out, seen = serve(script)
      assert.same({}, seen, script)
      local _, n = out:gsub("HTTP/1.[01] 4%d%d ", "")
      assert.is_true(n <= 1, out) -- what is refused at its head may lose the answer
      assert.is_nil(out:find("HTTP/1.[01] [^4]"))
    end
    wait_for_none()
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

  it("refuses headers, bodies and methods beyond its limits", function()
    open { header_bytes = 1000, body_bytes = 1000 }
    for _, script in ipairs {
      "printf 'GET / HTTP/1.1\\r\\nX: %2000s\\r\\n\\r\\n' a >&3;" .. READ_ALL,
      "printf 'POST / HTTP/1.1\\r\\nContent-Length: 1001\\r\\n\\r\\n%1001s' a >&3;" .. READ_ALL,
      "printf 'POST / HTTP/1.1\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n7d0\\r\\n%2000s' a >&3;"
        .. READ_ALL,
      "printf 'BREW / HTTP/1.1\\r\\n\\r\\n' >&3;" .. READ_ALL,
      "printf 'nonsense\\r\\n\\r\\n' >&3;" .. READ_ALL,
    } do
      local out, seen = serve(script)
      assert.same({}, seen)
      assert.is_nil(out:find("HTTP/1.1 200", 1, true))
      assert.is_nil(out:find("<", 1, true)) -- no page of the library's
    end
    wait_for_none()
  end)

  it("answers errors of its own in the form that it is given", function()
    local function length_of(out)
      local head, body = out:match("^(.-)\r\n\r\n(.*)$")
      return tonumber(head:match("Content%-Length: (%d+)")) == #body
    end
    for script, want in pairs {
      ["printf 'GET / HTTP/1.1\\r\\nHost: x\\r\\nX: %2000s\\r\\n\\r\\n' a"] =
        { "400 Bad Request", "malformed HTTP, or a head of more than 1000 bytes" },
      ["printf 'nonsense\\r\\n\\r\\n'"] = { "400 Bad Request",
        "malformed HTTP, or a head of more than 1000 bytes" },
      ["printf 'POST / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 1500\\r\\n\\r\\n%1500s' a"] =
        { "413 Content Too Large", "the body has more than 1000 bytes" },
      ["printf 'POST / HTTP/1.1\\r\\nHost: x\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\nx\\r\\n'"] =
        { "400 Bad Request", "a chunk of the body has no size or no end that can be read" },
      ["printf 'GET / HTTP/1.1\\r\\n\\r\\n'"] = { "400 Bad Request",
        "Host: the header field is missing" },
      ["printf 'GET / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length:\\r\\n 5\\r\\n\\r\\nhello'"] =
        { "400 Bad Request", "a line of the head begins with a blank" },
      ["printf 'POST / HTTP/1.1\\r\\nHost: x\\r\\nTransfer-Encoding: gzip\\r\\n\\r\\n'"] = {
        "400 Bad Request", "Transfer-Encoding: nothing but chunked is taken" },
      ["printf 'GET / HTTP/1.1\\r\\nHost: x\\r\\nHost: y\\r\\n\\r\\n'"] = { "400 Bad Request",
        "a header field comes twice that may come once" },
      ["printf 'CONNECT a:1 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'"] =
        { "501 Not Implemented", "this server is no proxy", " (ours)" },
      -- Behind a reply of ours on the same connection.
      [get("/") .. "; read -r _ <&3; printf 'nonsense\\r\\n\\r\\n'"] =
        { "400 Bad Request", "malformed HTTP, or a head of more than 1000 bytes" },
    } do
      open { header_bytes = 1000, body_bytes = 1000 }
      assert(net:set_error_form("text/x-error", "[", "]", "] (ours)"))
      -- In one piece, as the reply closes the connection.
      local at_once = " | dd bs=8192 iflag=fullblock status=none >&3; "
      local out = serve(script .. at_once .. READ_ALL, function(kind, r)
        if kind == "request" then r:reply(200, {}, "first") end
      end)
      out = assert(out:match("^.*(HTTP/1.*)$"), script .. out)
      assert.equal("HTTP/1.1 " .. want[1], out:match("^[^\r]*"), script)
      assert.matches("\r\nContent%-Type: text/x%-error\r\n", out)
      assert.matches("\r\nConnection: close\r\n", out)
      assert.equal(("[%s]%s"):format(want[2], want[3] or ""), out:match("\r\n\r\n(.*)$"))
      assert.is_true(length_of(out))
      net:close()
    end
    open()
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

  it("refuses what is too much for all requests together, but none that is small", function()
    -- 4000 bytes in common, and 1000 for each connection
    open { body_bytes = 1 << 20, total_bytes = 8000, connections = 4 }
    local held
    local function post(n)
      return ("printf 'POST / HTTP/1.1\\r\\nHost: x\\r\\n%sContent-Length: %d\\r\\n\\r\\n%%%ds' a")
        :format(CLOSE, n, n) .. " >&3;" .. READ_ALL
    end
    local function answer(kind, r)
      if kind ~= "request" then return end
      r:reply(200, {}, ("%d bytes"):format(#r:body()))
    end
    local function hold(kind, r) if kind == "request" then held = r end end
    assert.matches("3000 bytes$", (serve(post(3000), answer)))
    local a = client(port, post(3000))
    while not held do hold(net:wait(0.05)) end
    assert.matches("^HTTP/1.1 503 .-\r\nRetry%-After: 2\r\n", (serve(post(3000), answer)))
    assert.matches("^HTTP/1.1 503 ", (serve(post(300000), answer)))
    assert.matches("500 bytes$", (serve(post(500), answer)))
    answer("request", held)
    while not a.is_done() do net:wait(0.05) end
    assert.matches("3000 bytes$", a.output())
    assert.matches("3000 bytes$", (serve(post(3000), answer)))
    assert.equal(0, net:n_connections())
  end)

  it("tells a client that its request is too large for ever from one that may try again", function()
    -- 4000 bytes in common: more than a request may have, and less than this one has
    open { header_bytes = 1000, body_bytes = 1000, total_bytes = 8000, connections = 4 }
    local post = "printf 'POST / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 300000\\r\\n\\r\\n"
      .. "%300000s' a >&3;" .. READ_ALL
    assert.matches("^HTTP/1.1 413 ", (serve(post, function() error "must not come" end)))
    wait_for_none()
  end)

  local HEAD <const> = "POST / HTTP/1.1\\r\\nHost: x\\r\\n"
  local CHUNKED <const> = HEAD .. "Transfer-Encoding: chunked\\r\\n\\r\\n"

  -- Nothing but the answer ends these clients.
  it("refuses a body by the length that its head declares, whether it comes or not", function()
    open { body_bytes = 1000 }
    for _, length in ipairs { "1001", "99999999999999999999999", "0001001" } do
      for _, script in ipairs {
        "printf '%sContent-Length:\\t%s  \\r\\n\\r\\n' >&3;" .. READ_ALL,
        "printf '%sExpect: 100-continue\\r\\nCONTENT-length: %s\\r\\n\\r\\n' >&3;" .. READ_ALL,
        "printf '%sContent-Length: %s\\r\\n\\r\\n%%9999999s' a >&3;" .. READ_ALL,
      } do
        local out, seen = serve(script:format(HEAD, length))
        assert.matches("^HTTP/1.1 413 ", out, script)
        assert.same({}, seen)
      end
    end
    wait_for_none()
  end)

  it("refuses chunks as soon as they are too much, or are none", function()
    open { body_bytes = 1000 }
    local function after(line) return ("printf '%s' >&3;"):format(CHUNKED .. line) .. READ_ALL end
    for line, status in pairs {
      ["3e9\\r\\n"] = 413, ["ffffffffffffffff\\r\\n"] = 413, ["10000000000000000\\r\\n"] = 413,
      ["1\\r\\na\\r\\n3e8;x\\r\\n"] = 413, ["-5\\r\\n"] = 400, ["-0\\r\\n"] = 400,
      ["+5\\r\\n"] = 400, ["0x5\\r\\n"] = 400, [" 5\\r\\n"] = 400, [";5\\r\\n"] = 400,
      ["5g\\r\\n"] = 400, ["1\\r\\naz\\r\\n"] = 400, [("0"):rep(2000)] = 400,
      ["5;" .. ("x"):rep(2000)] = 400,
      -- RFC 9112, 7.1: lines end in CRLF, also the one that a chunk's bytes are.
      ["1;\\n"] = 400, ["1\\r\\na1\\r\\n"] = 400, ["1\\r\\na\\n"] = 400,
      ["1;\\rx\\r\\n"] = 400, ["\\r\\n1\\r\\n"] = 400, ["1\\r\\na\\r\\r\\n"] = 400,
    } do
      local out, seen = serve(after(line))
      assert.matches("^HTTP/1.1 " .. status, out, line)
      assert.same({}, seen, line)
    end
    local padded <const> = HEAD .. "Transfer-Encoding:" .. (" "):rep(60) .. "chunked\\r\\n\\r\\n"
    local script = ("printf '%s0x1\\r\\n' >&3;"):format(padded) .. READ_ALL
    assert.matches("^HTTP/1.1 400", (serve(script)))
    -- Where libevent sees the end of a head.
    local nul <const> = "printf '%sTransfer-Encoding: chunked\\r\\n\\0\\r\\n%s' >&3;" .. READ_ALL
    assert.matches("^HTTP/1.1 400", (serve(nul:format(HEAD, ("0"):rep(2000)))))
    wait_for_none()
  end)

  it("takes bodies up to its limit, whole or as one chunk", function()
    open { header_bytes = 1000, body_bytes = 100000 }
    for _, script in ipairs { "'%sContent-Length: 100000\\r\\n\\r\\n%%0100000d' 7",
      "'%sTransfer-Encoding: chunked\\r\\n\\r\\n186a0;x\\r\\n%%0100000d\\r\\n0\\r\\n\\r\\n' 7" } do
      local n
      serve("printf " .. script:format(HEAD .. CLOSE) .. " >&3;" .. READ_ALL, function(kind, r)
        if kind ~= "request" then return end
        n = #r:body()
        r:reply(200, {}, "")
      end)
      assert.equal(100000, n)
    end
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

  it("refuses a second request for its sizes as it does the first", function()
    open { body_bytes = 1000 }
    for line, status in pairs { ["3e9\\r\\n"] = 413, ["+1\\r\\n"] = 400 } do
      local out = serve(("printf '%s1\\r\\na\\r\\n0\\r\\n\\r\\n%s' >&3;"):format(CHUNKED,
        CHUNKED .. line) .. READ_ALL, function(kind, r)
          if kind == "request" then r:reply(200, {}, r:body()) end
        end)
      assert.matches("^HTTP/1.1 200 OK\r\n.-\r\n\r\naHTTP/1.1 " .. status, out)
    end
    wait_for_none()
  end)

  -- RFC 9112, 7.1.1: a recipient must ignore extensions that it does not know.
  it("passes over extensions of chunks, in whatever pieces they come", function()
    open()
    local chunks <const> = [[Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n]]
      .. [[06 ; c="1 2;3"\r\n; it;0\r\n1;\r\n;\r\n0;last\r\nX: y;z\r\n\r\n]]
    local bytes = HEAD .. chunks .. HEAD .. CLOSE .. chunks
    for _, write in ipairs { "printf '%s' >&3;", [[text=$(printf '%s.'); text=${text%%.}
      for ((i = 0; i < ${#text}; i++)); do printf %%s "${text:i:1}" >&3; done;]] } do
      local bodies = {}
      serve(write:format(bytes) .. READ_ALL, function(kind, r)
        if kind ~= "request" then return end
        bodies[#bodies + 1] = r:body()
        r:reply(200, {}, "")
      end)
      assert.same({ "hello; it;0;", "hello; it;0;" }, bodies)
    end
  end)

  it("refuses of several that are too much together only those that came last", function()
    open { body_bytes = 1 << 20, total_bytes = 8000, connections = 8 } -- 4000, and 500 for each
    local function sent() -- by a script, and what tells when it has
      local mark = os.tmpname()
      os.remove(mark)
      finally(function() os.remove(mark) end)
      return ": >" .. mark .. ";", function()
        local file = io.open(mark)
        return file and file:close()
      end
    end
    local function wait_until(is_so, handle)
      while not is_so() do
        local kind, r = net:wait(0.05)
        if kind == "request" and handle then handle(r) end
      end
    end
    local POST <const> = "printf 'POST / HTTP/1.1\\r\\nHost: x\\r\\n" .. CLOSE
      .. "Content-Length: 2200\\r\\n\\r\\n%2000s' a >&3;"
    local wait_told, tell = event()
    local first, last = {}, {}
    for i = 1, 2 do
      local mark, has_sent = sent()
      first[i] = client(port, POST .. mark .. wait_told .. "; printf '%200s' a >&3;" .. READ_ALL)
      wait_until(function() return has_sent() and net:n_connections() == i end)
      net:wait(0.05) -- reads what is there
    end
    for i = 1, 3 do
      local mark, has_read = sent()
      last[i] = client(port, POST .. READ_ALL .. ";" .. mark .. wait_told)
      wait_until(has_read)
    end
    -- They stay, but not with more than half of the bytes.
    wait_until(function() return net:n_connections() < 5 end)
    assert.is_true(net:n_connections() >= 3)
    tell()
    for _, c in ipairs(first) do
      wait_until(c.is_done, function(r) r:reply(200, {}, ("%d bytes"):format(#r:body())) end)
      assert.matches("2200 bytes$", c.output())
    end
    for i, c in ipairs(last) do
      wait_until(c.is_done)
      local out = c.output()
      if i == 1 then assert.matches("^HTTP/1.1 503 ", out) end
      assert.is_nil(out:find("200", 1, true))
    end
    wait_until(function() return net:n_connections() == 0 end)
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
