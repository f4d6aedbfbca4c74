--- Snapshots of sequences by what they begin with, within a budget of memory.
---
--- A recurrent state cannot be cut back, so a prompt can only go on from a point where somebody has
--- kept the state: this keeps such points and finds the last one that a prompt runs through.
--- Keys and values are shared between snapshots; what an entry costs by itself is its state.

local options = require "moonlet.options"

local prefix_cache = {}

---@class moonlet.PrefixCache
---@field bytes integer  of all entries' states; pages of keys and values are the model's to count
---@field n integer  entries
local Cache = {}
Cache.__index = Cache

---@param model moonlet.Model
---@param budget integer bytes for states and for pages of keys and values, also live ones
---@return moonlet.PrefixCache
function prefix_cache.open(model, budget)
  if math.type(budget) ~= "integer" or budget < 0 then
    options.misuse("prefix cache: bytes expected")
  end
  return setmetatable({ model = model, budget = budget, bytes = 0, n = 0, clock = 0,
    by_key = {}, lengths = {} }, Cache)
end

-- hashes[i] is of ids[1..i]; 64-bit arithmetic wraps, which is what a hash wants.
local function hashes_of(ids)
  local hashes, h = {}, 0
  for i = 1, #ids do
    h = (h ~ ids[i]) * 0x2545F4914F6CDD1D + 0x9E3779B97F4A7C1
    hashes[i] = h ~ (h >> 29)
  end
  return hashes
end

local function key_of(hash, n)
  return ("%d:%x"):format(n, hash)
end

local function begins_with(ids, prefix, n)
  for i = 1, n do
    if ids[i] ~= prefix[i] then return false end
  end
  return true
end

local function remove(self, entry)
  self.by_key[entry.key] = nil
  self.lengths[entry.n] = self.lengths[entry.n] - 1
  if self.lengths[entry.n] == 0 then self.lengths[entry.n] = nil end
  self.n, self.bytes = self.n - 1, self.bytes - entry.bytes
  entry.snapshot:close()
end

-- The least useful entry: a point that a longer entry runs through is worth less than one that
-- ends a sequence of its own, and what was used long ago less than what was used lately.
local function least_useful(self)
  local worst
  for _, entry in pairs(self.by_key) do
    if not worst or entry.used < worst.used then worst = entry end
  end
  return worst
end

---Drops entries until what is held fits the budget.
function Cache:trim()
  while self.n > 0 and self.bytes + self.model:kv_bytes() > self.budget do
    remove(self, least_useful(self))
  end
end

---Keeps where a session stands.
---@param session moonlet.Session
---@param ids integer[] that the session holds; borrowed, must not change
---@param n integer? how many of them; default all
---@return boolean? kept, string? message, string? code
function Cache:put(session, ids, n)
  n = n or #ids
  self.clock = self.clock + 1
  local key = key_of(hashes_of(table.move(ids, 1, n, 1, {}))[n], n)
  local old = self.by_key[key]
  if old then
    old.used = self.clock
    return true
  end
  local stats = session:stats()
  if stats.state_bytes > self.budget then return false end
  local snapshot, message, code = session:snapshot()
  if not snapshot then return nil, message, code end
  self.by_key[key] = { key = key, n = n, ids = ids, snapshot = snapshot,
    bytes = stats.state_bytes, used = self.clock }
  self.lengths[n] = (self.lengths[n] or 0) + 1
  self.n, self.bytes = self.n + 1, self.bytes + stats.state_bytes
  self:trim()
  return true
end

---Brings a session to the last point kept that `ids` run through.
---@param session moonlet.Session its content is given up
---@param ids integer[]
---@return integer reused how many ids it then holds
function Cache:restore(session, ids)
  local lengths = {}
  for n in pairs(self.lengths) do
    if n <= #ids then lengths[#lengths + 1] = n end
  end
  table.sort(lengths, function(a, b) return a > b end)
  local hashes = #lengths > 0 and hashes_of(ids) or {}
  for _, n in ipairs(lengths) do
    local entry = self.by_key[key_of(hashes[n], n)]
    if entry and begins_with(ids, entry.ids, n) and session:restore(entry.snapshot) then
      self.clock = self.clock + 1
      entry.used = self.clock
      return n
    end
  end
  session:reset()
  return 0
end

---Frees everything.
function Cache:close()
  for _, entry in pairs(self.by_key) do entry.snapshot:close() end
  self.by_key, self.lengths, self.n, self.bytes = {}, {}, 0, 0
end

Cache.__close = Cache.close

return prefix_cache
