--- Fields of a request's body, checked as they are read. null is the same as absent.

local json = require "moonlet.json"
local refusal = require "moonlet.server.refusal"

local fields = {}

---@class moonlet.server.Fields
---@field body table
---@field path string in front of names in messages: "stream_options."
local Fields = {}
Fields.__index = Fields

---@param body table a JSON object
---@param path string?
---@return moonlet.server.Fields
function fields.of(body, path)
  return setmetatable({ body = body, path = path or "" }, Fields)
end

---Answers 400 for a field.
function Fields:refuse(name, what)
  local place = self.path .. name
  refusal.raise(400, ("%s: %s"):format(place, what), { param = place })
end

---Answers 400 for what this server cannot make a model keep to.
function Fields:refuse_constraint(name, what)
  self:refuse(name, what .. " needs constrained decoding, which this server does not have yet")
end

---@return any value nil when it is absent or null
function Fields:get(name)
  local value = self.body[name]
  if value == json.null then return nil end
  return value
end

local function reader(what, fits)
  return function(self, name)
    local value = self:get(name)
    if value ~= nil and not fits(value) then self:refuse(name, what .. " expected") end
    return value
  end
end

Fields.string = reader("a string", function(v) return type(v) == "string" end)
Fields.boolean = reader("true or false", function(v) return type(v) == "boolean" end)
Fields.number = reader("a number", function(v) return type(v) == "number" and v == v end)
Fields.array = reader("a list", json.is_array)
Fields.object = reader("an object", json.is_object)

---A list of at most so many.
---@param max integer
---@return table?
function Fields:list(name, max)
  local list = self:array(name)
  if list and #list > max then self:refuse(name, ("at most %d are possible"):format(max)) end
  return list
end

---A list of objects, each as fields of its own.
---@param max integer?
---@return moonlet.server.Fields[]?
function Fields:objects(name, max)
  local list = self:list(name, max or math.maxinteger)
  local objects = list and {}
  for i, given in ipairs(list or {}) do
    local place = ("%s[%d]"):format(name, i - 1)
    if not json.is_object(given) then self:refuse(place, "an object expected") end
    objects[i] = fields.of(given, ("%s%s."):format(self.path, place))
  end
  return objects
end

---An integer, also one that is spelled 1.0.
---@param name string
---@param min integer?
---@param max integer?
---@return integer?
function Fields:integer(name, min, max)
  local given = self:get(name)
  if given == nil then return nil end
  local value = type(given) == "number" and math.tointeger(given)
  if not value then self:refuse(name, "an integer expected") end
  if min and value < min then self:refuse(name, ("%d or more expected"):format(min)) end
  if max and value > max then self:refuse(name, ("at most %d is possible"):format(max)) end
  return value
end

---A list of at most `max` texts; a single text is a list of one.
---@return string[]?
function Fields:texts(name, max)
  local given = self:get(name)
  if given == nil then return nil end
  local list = type(given) == "string" and { given } or given
  if type(given) ~= "string" and not json.is_array(given) then
    self:refuse(name, "a string or a list of strings expected")
  end
  if #list > max then self:refuse(name, ("at most %d are possible"):format(max)) end
  for _, text in ipairs(list) do
    if type(text) ~= "string" then self:refuse(name, "a string or a list of strings expected") end
  end
  return list
end

---Token ids of a vocabulary.
---@param n_vocab integer
---@return integer[]?
function Fields:ids(name, n_vocab)
  local given = self:array(name)
  return given and fields.check_ids(given, n_vocab, function(what) self:refuse(name, what) end)
end

---@param list table
---@param n_vocab integer
---@param refuse fun(what: string)
---@return integer[]
function fields.check_ids(list, n_vocab, refuse)
  local ids = {}
  for i, given in ipairs(list) do
    local id = type(given) == "number" and math.tointeger(given)
    if not id then refuse("token ids expected") end
    if id < 0 or id >= n_vocab then
      refuse(("%d is not a token id (0 to %d)"):format(id, n_vocab - 1))
    end
    ids[i] = id
  end
  return ids
end

return fields
