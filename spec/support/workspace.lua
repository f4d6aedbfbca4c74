-- Directories that specs fill and tools work in.

local workspace = {}

-- A new directory with files { name = text }; names may have directories in them.
function workspace.new(files)
  local dir = os.tmpname()
  os.remove(dir)
  local self = { dir = dir }
  function self.path(name) return dir .. "/" .. name end
  function self.write(name, text)
    local parent = self.path(name):match("^(.*)/")
    assert(os.execute(("mkdir -p '%s'"):format(parent)))
    local file <close> = assert(io.open(self.path(name), "wb"))
    assert(file:write(text))
  end
  function self.read(name)
    local file <close> = io.open(self.path(name), "rb")
    return file and file:read("a")
  end
  function self.run(command)
    local pipe = assert(io.popen(("cd '%s' && (%s) 2>&1"):format(dir, command)))
    local text = pipe:read("a")
    pipe:close()
    return text
  end
  function self.remove()
    os.execute(("chmod -R u+w '%s'; rm -rf '%s'"):format(dir, dir))
  end
  assert(os.execute(("mkdir '%s'"):format(dir)))
  for name, text in pairs(files or {}) do self.write(name, text) end
  return self
end

return workspace
