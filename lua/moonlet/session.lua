--- A session: one mutable timeline of tokens on a model.
local generate = require "moonlet.generate"
local options = require "moonlet.options"
local prefix_cache = require "moonlet.prefix_cache"

local SYNC <const> = { cache = "table", keep_at = "table" }

---@class moonlet.Session
---@field model moonlet.Model
local Session = {}
Session.__index = Session

---@param model moonlet.Model
---@param opts { ctx: integer, kv: string }
function Session.open(model, opts)
  local handle, message, code = model.core:session(opts)
  if not handle then return nil, message, code end
  return setmetatable({ model = model, core = handle, opts = opts }, Session)
end

function Session:close()
  self.core:close()
end

Session.__close = Session.close

local function check_table(value, what)
  if type(value) ~= "table" then options.misuse(what .. " expected, got " .. type(value)) end
end

-- Reads a prompt from a position on, keeping the states that others may go on from.
local function read(self, ids, from, o)
  for _, to in ipairs(prefix_cache.points(#ids, from, o.keep_at or {})) do
    local ok, message, code = self.core:eval(table.move(ids, from + 1, to, 1, {}))
    if not ok then return nil, message, code end
    ok, message, code = o.cache:put(self, ids, to)
    if ok == nil then return nil, message, code end
    from = to
  end
  return true
end

---Makes ids the whole content of the session and evaluates only what is new. A recurrent state
---cannot be cut back, so the session goes on from all that it holds, or from the last state in the
---cache that ids run through, or from the beginning. Ids that do not fit leave it as it was.
---@param ids integer[] with a cache borrowed, must not change
---@param opts? { cache: moonlet.PrefixCache?, keep_at: integer[]? } where states are kept, also of
---  what the session held; after how many ids, besides regular ones and the end
---@return integer? reused, integer|string evaluated, string? code
function Session:sync(ids, opts)
  check_table(ids, "list of token ids")
  local o = options.check(opts, SYNC)
  local ok
  local reused, message, code = self.core:reusable(ids)
  if not reused then return nil, message, code end
  if o.cache then
    if reused == 0 and self:n_past() > 0 then
      ok, message, code = o.cache:put(self, self:ids())
      if ok == nil then return nil, message, code end
    end
    reused = o.cache:restore(self, ids, reused)
    ok, message, code = read(self, ids, reused, o)
  else
    if reused == 0 then self.core:reset() end
    ok, message, code = self.core:eval(table.move(ids, reused + 1, #ids, 1, {}))
  end
  if not ok then return nil, message, code end
  return reused, #ids - reused
end

---Appends one token.
---@param id integer
---@return boolean? ok, string? message, string? code
function Session:step(id)
  if math.type(id) ~= "integer" then options.misuse("token id expected, got " .. type(id)) end
  return self.core:eval({ id })
end

---Logits after the last token. The view is stale, and raises, once the session changes.
function Session:logits()
  return self.core:logits()
end

---@return boolean whether there are any: not before the first token, nor behind a cancelled prompt
function Session:has_logits()
  return self.core:has_logits()
end

---Appends ids and scores what follows each of them.
---@param ids integer[]
---@param targets integer[] the token that should follow ids[i]; negative: not scored
---@return table? nll tensor [#ids], nats, 0 where nothing was scored
function Session:score(ids, targets)
  check_table(ids, "list of token ids")
  check_table(targets, "list of target ids")
  return self.core:score(ids, targets)
end

---Appends ids and returns what the last norm puts out where there is a target: all that is needed
---to make logits of those positions later, in a thousandth of their space. For Model:compare.
---@param ids integer[]
---@param targets integer[] the token that should follow ids[i]; negative: no row
---@return table? final tensor [k, hidden]
function Session:final(ids, targets)
  check_table(ids, "list of token ids")
  check_table(targets, "list of target ids")
  return self.core:final(ids, targets)
end

---Generates tokens from the sampler's choices; see moonlet.generate.
function Session:generate(opts)
  return generate.tokens(self, opts)
end

function Session:n_past()
  return self.core:n_past()
end

function Session:n_ctx()
  return self.core:n_ctx()
end

---@return integer[] ids everything evaluated so far
function Session:ids()
  return self.core:ids()
end

function Session:reset()
  self.core:reset()
end

---A copy of the timeline, for restore(); has close().
function Session:snapshot()
  return self.core:snapshot()
end

---@param snapshot userdata of a session on the same model with the same cache codec
function Session:restore(snapshot)
  return self.core:restore(snapshot)
end

---Another session at the same point.
---@return moonlet.Session? session, string? message, string? code
function Session:fork()
  local snapshot <close>, message, code = self.core:snapshot()
  if not snapshot then return nil, message, code end
  local other
  other, message, code = Session.open(self.model, self.opts)
  if not other then return nil, message, code end
  local ok
  ok, message, code = other.core:restore(snapshot)
  if not ok then
    other:close()
    return nil, message, code
  end
  return other
end

---Where time goes. profile(true) counts from zero, profile(false) stops, profile() answers.
---@param on? boolean
---@return table? profile batches, tokens, and a list of { op, calls, seconds, bytes }
function Session:profile(on)
  if on == nil then return self.core:profile() end
  if type(on) ~= "boolean" then options.misuse("true or false expected, got " .. type(on)) end
  self.core:profile(on)
end

---@return table stats codec, kv_bytes and state_bytes in use, n_past, n_ctx
function Session:stats()
  return self.core:stats()
end

return Session
