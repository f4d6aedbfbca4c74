-- What specs of other people's programs need: where these are installed, a folder to work in, and
-- answers that call tools.

local clients = {}

function clients.dir()
  return assert(os.getenv("MOONLET_CLIENTS"), "see spec/client/setup.sh")
end

-- A folder with home/ and proj/ in it, gone when it is closed.
function clients.scratch()
  local dir = os.tmpname()
  os.remove(dir)
  assert(os.execute(("mkdir -p %s/home %s/proj"):format(dir, dir)))
  local self = { dir = dir }
  function self.write(path, text)
    assert(os.execute(("mkdir -p $(dirname %s/%s)"):format(dir, path)))
    local file <close> = assert(io.open(dir .. "/" .. path, "w"))
    file:write(text)
  end
  function self.read(path)
    local file <close> = assert(io.open(dir .. "/" .. path))
    return file:read("a")
  end
  function self.close() os.execute("rm -rf " .. dir) end
  return setmetatable(self, { __close = self.close })
end

-- What docs/server.md has the users of a client paste, where the server is at `url`, and the file
-- that it says to paste it into.
function clients.documented(name, url)
  local file <close> = assert(io.open("docs/server.md"))
  for intro, text in file:read("a"):gmatch("\n([^\n]+):\n\n```%l+\n(.-)```") do
    if intro:sub(1, #name) == name then
      local here, n = text:gsub("http://127.0.0.1:8080", url)
      assert(n == 1, text)
      return here, intro:match("`~/([^`]+)`")
    end
  end
  error("docs/server.md: nothing for " .. name)
end

-- A call as Qwen's models write it; arguments are pairs of a name and a text.
function clients.call(name, arguments)
  local parts = { "<tool_call>\n<function=" .. name .. ">\n" }
  for _, pair in ipairs(arguments) do
    parts[#parts + 1] = ("<parameter=%s>\n%s\n</parameter>\n"):format(pair[1], pair[2])
  end
  return table.concat(parts) .. "</function>\n</tool_call>"
end

-- The statuses of what a server answers from now on.
function clients.statuses(server)
  local list = {}
  server.on_served = function(exchange) list[#list + 1] = exchange.status end
  return list
end

return clients
