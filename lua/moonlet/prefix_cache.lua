--- Snapshots of sequences by what they begin with, within a budget of memory.
---
--- A recurrent state cannot be cut back, so a prompt can only go on from a point where somebody has
--- kept the state: this keeps such points and finds the last one that a prompt runs through.
--- What an entry costs by itself is its state and the logits behind it. Keys and values are shared
--- between snapshots, and those that sessions hold, too, cost nothing: however long a sequence in
--- use is, its points stay.

local options = require "moonlet.options"

local prefix_cache = {}

local LOGIT_BYTES <const> = 4
local ID_BYTES <const> = 16 + 4 -- in a table of Lua, and in the snapshot
local INTERVAL <const> = 1024   -- a prompt's state is kept at least this often
local NEAR <const> = 2          -- tokens behind a state that is kept, another one is not worth it

---@class moonlet.PrefixCache
---@field bytes integer  of all entries' states, logits and ids; keys and values are the model's to
---  count
---@field kept integer  bytes of keys and values that no session held, when entries last changed
---@field n integer  entries
local Cache = {}
Cache.__index = Cache

---@param model moonlet.Model
---@param budget integer bytes for states, and for keys and values that no session holds
---@return moonlet.PrefixCache
function prefix_cache.open(model, budget)
  if math.type(budget) ~= "integer" or budget < 0 then
    options.misuse("prefix cache: bytes expected")
  end
  return setmetatable({ model = model, budget = budget, bytes = 0, kept = 0, n = 0,
    logits_bytes = LOGIT_BYTES * model:info().config.vocab_size,
    clock = 0, by_key = {}, lengths = {} }, Cache)
end

---Positions of a prompt after which the state is worth keeping: those asked for, regular ones, and
---its end, so that the same prompt again has logits to sample from. Each of them ends a batch, and
---a short batch takes as long as reading the weights does: too long for the two tokens with which
---templates close an answer whose end is kept.
---@param n_ids integer that the prompt has
---@param position integer up to which it needs no evaluation
---@param keep_at integer[]
---@return integer[] points rising, behind the position
function prefix_cache.points(n_ids, position, keep_at)
  local wanted, points = { [n_ids] = true }, {}
  for _, n in ipairs(keep_at) do
    if n > position + NEAR then wanted[n] = true end
  end
  for n = INTERVAL, n_ids - 1, INTERVAL do wanted[n] = true end
  for n in pairs(wanted) do
    if n > position and n <= n_ids then points[#points + 1] = n end
  end
  table.sort(points)
  return points
end

-- hashes[i] is of ids[1..i]; 64-bit arithmetic wraps, which is what a hash wants.
local function hashes_of(ids, n)
  local hashes, h = {}, 0
  for i = 1, n do
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

-- The entry with most ids, fewer than so many, that these begin with.
local function longest(self, ids, hashes, below)
  local found
  for n in pairs(self.lengths) do
    if n < below and n > (found and found.n or 0) then
      local entry = self.by_key[key_of(hashes[n], n)]
      if entry and begins_with(ids, entry.ids, n) then found = entry end
    end
  end
  return found
end

local function remove(self, entry)
  self.by_key[entry.key] = nil
  for _, other in pairs(self.by_key) do
    if other.parent == entry then other.parent = entry.parent end
  end
  self.lengths[entry.n] = self.lengths[entry.n] - 1
  if self.lengths[entry.n] == 0 then self.lengths[entry.n] = nil end
  self.n, self.bytes = self.n - 1, self.bytes - entry.bytes
  entry.snapshot:close()
end

local function add(self, entry, hashes)
  entry.parent = longest(self, entry.ids, hashes, entry.n)
  for _, other in pairs(self.by_key) do
    if other.parent == entry.parent and other.n > entry.n
      and begins_with(other.ids, entry.ids, entry.n) then
      other.parent = entry
    end
  end
  self.by_key[entry.key] = entry
  self.lengths[entry.n] = (self.lengths[entry.n] or 0) + 1
  self.n, self.bytes = self.n + 1, self.bytes + entry.bytes
end

-- The least useful entry: what it saves is the ids behind the next shorter entry that it goes on
-- from, and that counts the less the longer it has not been used.
local function least_useful(self)
  local worst, least
  for _, entry in pairs(self.by_key) do
    local saved = entry.n - (entry.parent and entry.parent.n or 0)
    local use = saved / (self.clock - entry.used + 1)
    if not least or use < least or use == least and entry.used < worst.used then
      worst, least = entry, use
    end
  end
  return worst
end

---Drops entries until what is held fits the budget.
function Cache:trim()
  local function count() self.kept = select(2, self.model:kv_bytes()) end
  count()
  while self.n > 0 and self.bytes + self.kept > self.budget do
    remove(self, least_useful(self))
    count()
  end
end

---How much of the budget was taken when entries last changed. Unlike the model it can be asked at
---any time.
---@return integer bytes
function Cache:used()
  return self.bytes + self.kept
end

---Keeps where a session stands, unless it has no logits: who goes on from there needs them.
---@param session moonlet.Session
---@param ids integer[] that the session holds; borrowed, must not change
---@param n integer? how many of them; default all
---@return boolean? kept, string? message, string? code
function Cache:put(session, ids, n)
  n = n or #ids
  if not session:has_logits() then return false end
  self.clock = self.clock + 1
  local hashes = hashes_of(ids, n)
  local key = key_of(hashes[n], n)
  local old = self.by_key[key]
  if old then
    old.used = self.clock
    return true
  end
  local bytes = session:stats().state_bytes + self.logits_bytes + ID_BYTES * n
  if bytes > self.budget then return false end
  local snapshot, message, code = session:snapshot()
  if not snapshot then return nil, message, code end
  add(self, { key = key, n = n, ids = ids, snapshot = snapshot, bytes = bytes,
    used = self.clock }, hashes)
  self:trim()
  return true
end

---Brings a session to the last point kept that `ids` run through.
---@param session moonlet.Session its content is given up, unless that is best
---@param ids integer[]
---@param n_held integer? how many of the ids are what the session holds
---@return integer reused how many ids it then holds
function Cache:restore(session, ids, n_held)
  n_held = n_held or 0
  if n_held == #ids and not session:has_logits() then n_held = 0 end
  local hashes = self.n > 0 and hashes_of(ids, #ids) or {}
  local entry = longest(self, ids, hashes, #ids + 1)
  if entry then
    self.clock = self.clock + 1
    entry.used = self.clock
  end
  if n_held > 0 and n_held >= (entry and entry.n or 0) then return n_held end
  local restored = entry and session:restore(entry.snapshot)
  if not restored then session:reset() end
  self:trim() -- what the session held may be held by snapshots alone now
  return restored and entry.n or 0
end

---Frees everything.
function Cache:close()
  for _, entry in pairs(self.by_key) do entry.snapshot:close() end
  self.by_key, self.lengths, self.n, self.bytes = {}, {}, 0, 0
end

Cache.__close = Cache.close

return prefix_cache
