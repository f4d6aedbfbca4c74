--- The `loop` variable of a for statement (jinja2/runtime.py, LoopContext).

local bind = require("moonlet.jinja.bind")
local errors = require("moonlet.jinja.errors")
local value = require("moonlet.jinja.value")

local Loop = value.new_type("LoopContext")

local loop = {}

--- A loop over an iterable. `items`: what it iterates when that is not the iterable itself, and so
--- has no length of its own. `recurse(iterable, depth0)` renders the loop again, or is nil.
function loop.new(iterable, items, recurse, depth0)
  return setmetatable({ next = items or value.iter(iterable), index0 = -1,
    known_length = not items and value.length(iterable) or nil,
    recurse = recurse, depth0 = depth0 or 0 }, Loop)
end

--- Moves on; returns the next item or nil.
function loop.advance(self)
  local item = self.ahead
  if item ~= nil then self.ahead = nil else item = self.next() end
  if item == nil then return nil end
  self.index0 = self.index0 + 1
  self.before, self.current = self.current, item
  return item
end

local function peek(self)
  if self.ahead == nil then self.ahead = self.next() end
  return self.ahead
end

local function length(self)
  if not self.known_length then
    local rest, i = {}, 0
    for item in self.next do rest[#rest + 1] = item end
    self.known_length = #rest + self.index0 + 1 + (self.ahead ~= nil and 1 or 0)
    self.next = function()
      i = i + 1
      return rest[i]
    end
  end
  return self.known_length
end

local GET = {
  index = function(self) return self.index0 + 1 end,
  index0 = function(self) return self.index0 end,
  revindex = function(self) return length(self) - self.index0 end,
  revindex0 = function(self) return length(self) - self.index0 - 1 end,
  first = function(self) return self.index0 == 0 end,
  last = function(self) return peek(self) == nil end,
  length = length,
  depth = function(self) return self.depth0 + 1 end,
  depth0 = function(self) return self.depth0 end,
  previtem = function(self)
    if self.index0 == 0 then
      return value.undefined(nil, nil, "there is no previous item")
    end
    return self.before
  end,
  nextitem = function(self)
    local item = peek(self)
    if item == nil then return value.undefined(nil, nil, "there is no next item") end
    return item
  end,
}

local CALL = {
  cycle = function(self, items)
    if #items == 0 then errors.raise("TypeError", "no items for cycling given") end
    return items[self.index0 % #items + 1]
  end,
  changed = function(self, items)
    local now = value.tuple(items)
    if self.last_changed and value.eq(self.last_changed, now) then return false end
    self.last_changed = now
    return true
  end,
}

Loop.attribute = function(self, name)
  if GET[name] then return GET[name](self) end
  local call = CALL[name]
  if not call then return nil end
  return value.func(name, bind.signature(name, "*", function(_, items)
    return call(self, items)
  end))
end

Loop.length = length

Loop.call = function(self, _, args)
  if not self.recurse then
    errors.raise("TypeError",
      "The loop must have the 'recursive' marker to be called recursively.")
  end
  if #args ~= 1 then errors.raise("TypeError", "loop() takes exactly one argument") end
  return self.recurse(args[1], self.depth0 + 1)
end

Loop.repr = function(self)
  return ("<LoopContext %d/%d>"):format(self.index0 + 1, length(self))
end

return loop
