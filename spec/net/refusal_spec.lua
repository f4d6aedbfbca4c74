-- What the HTTP server refuses before anybody is asked, or takes though it looks odd: a raw client
-- against it.
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

  local HEAD <const> = "POST / HTTP/1.1\\r\\nHost: x\\r\\n"
  local CHUNKED <const> = HEAD .. "Transfer-Encoding: chunked\\r\\n\\r\\n"

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
        { "400 Bad Request", "a line of the head begins with a blank, or has a NUL or a CR in it" },
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

  it("refuses what ends lines for some and not for others", function()
    open()
    local hidden <const> = get("/hidden"):match("'(.*)'")
    for _, bytes in ipairs {
      "GET / HTTP/1.1\\r\\nHost: x\\r\\nX: a\\0b\\r\\n\\r\\n",
      "POST / HTTP/1.1\\r\\nHost: x\\r\\n\\0X: y\\r\\nContent-Length: 33\\r\\n\\r\\n",
      "GET / HTTP/1.1\\r\\nHost: x\\r\\nX: a\\r b\\r\\n\\r\\n",
      "GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\r\\n",
      CHUNKED .. "0\\0\\r\\n\\r\\n",
      CHUNKED .. "0\\r\\n\\0X: y\\r\\n\\r\\n",
      CHUNKED .. "0\\r\\nX: y\\r z\\r\\n\\r\\n",
    } do
      local out, seen = serve(("printf '%s%s' >&3;"):format(bytes, hidden) .. READ_ALL)
      assert.same({}, seen, bytes)
      assert.matches("^HTTP/1.1 400 ", out, bytes)
    end
    wait_for_none()
  end)

  it("speaks HTTP/1.0 and HTTP/1.1, and says so to others", function()
    open()
    for _, version in ipairs { "0.9", "0.0", "1.-1", "-1.1" } do
      local script = ("printf 'GET / HTTP/%s\\r\\nHost: x\\r\\n\\r\\n' >&3;"):format(version)
      local out, seen = serve(script .. READ_ALL)
      assert.same({}, seen, version)
      assert.equal("HTTP/1.1 505 HTTP Version Not Supported", out:match("^[^\r]*"), version)
    end
  end)

  -- RFC 9112, 2.2: some send one behind a body.
  it("passes over empty lines in front of requests, in whatever pieces they come", function()
    open()
    for _, script in ipairs {
      "printf '\\r\\n\\n%s\\r\\n%s' >&3;",
      "for c in '\\r' '\\n'; do printf $c >&3; sleep 0.05; done; printf '%s\\r' >&3; sleep 0.05;"
        .. "printf '\\n%s' >&3;",
    } do
      local targets = {}
      serve(script:format(get("/1"):match("'(.*)'"), get("/2", CLOSE):match("'(.*)'")) .. READ_ALL,
        function(kind, r)
          if kind ~= "request" then return end
          targets[#targets + 1] = r:target()
          r:reply(200, {}, "")
        end)
      assert.same({ "/1", "/2" }, targets, script)
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
end)
