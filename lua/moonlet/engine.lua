--- Several generations at once on one model: prompts read in pieces, decode steps of all in one
--- batch, states kept so that a prompt goes on where an earlier one left off.
---
---   local engine = engine.open(model, loop, { sessions = 4 })
---   local ticket = assert(engine:submit { ids = ids, options = { temperature = 0 } })
---   for token in ticket:tokens() do ... end          -- in a coroutine of the loop
---
--- Every sequence gets the tokens it would get alone, to the bit.

local generate = require "moonlet.generate"
local options = require "moonlet.options"
local prefix_cache = require "moonlet.prefix_cache"
local ticket_queue = require "moonlet.ticket"

local engine = {}

local BATCH <const> = 256      -- tokens that one evaluation takes
local ALONE <const> = 512      -- while nobody else is there: the most that core takes
local SHARED <const> = 64      -- of a prompt, while others wait for their next token
local SCORED <const> = 16      -- of a text, likewise: its tokens pass lm_head, so many at a time

local KNOWN <const> = { sessions = "integer", ctx = "integer", kv = "string", queue = "integer",
  cache_bytes = "integer", session = "table" }

---@class moonlet.Engine
---@field stats { prompt_tokens: integer, cached_tokens: integer, generated_tokens: integer,
---  batches: integer }  since it was opened
local Engine = {}
Engine.__index = Engine

---@class moonlet.Ticket
---@field reused integer? prompt tokens that needed no evaluation
---@field evaluated integer prompt tokens evaluated so far
---@field generation moonlet.Generation? once the prompt has been read
---@field finish_reason string? as a generation has it
---@field stop_id integer? the stop token that was sampled
---@field message string? why, with finish_reason "error"
---@field code string? "raised" when a stage of the sampler did
local Ticket = {}
Ticket.__index = Ticket

-- ---- tickets -----------------------------------------------------------------------------------

Ticket.push, Ticket.next, Ticket.tokens = ticket_queue.push, ticket_queue.next,
  ticket_queue.tokens

---Waits until it has ended.
function Ticket:wait()
  while not self.finish_reason do self.changed:wait() end
end

---Ends it: what was evaluated stays for the next that begins alike.
function Ticket:cancel()
  if self.finish_reason then return end
  self.cancelled = true
  self.engine:on_cancel(self)
end

local function end_ticket(self, reason, message, code)
  if self.finish_reason then return end
  self.finish_reason, self.message, self.code = reason, message, code
  self.changed:notify()
end

-- ---- opening -----------------------------------------------------------------------------------

local function open_sessions(self, o)
  if o.session then
    if o.sessions or o.ctx or o.kv then
      options.misuse("option 'session': it has its own ctx and kv")
    end
    self.free[1], self.keeps_session = o.session, true
    if o.session:n_past() == 0 then return true end
    local kept, message, code = self.cache:put(o.session, o.session:ids())
    if kept == nil then return nil, message, code end
    return true
  end
  for i = 1, o.sessions or 4 do
    local session, message, code = self.model:session { ctx = o.ctx, kv = o.kv }
    if not session then return nil, message, code end
    self.free[i] = session
  end
  return true
end

---@param model moonlet.Model
---@param loop moonlet.Loop
---@param given { sessions: integer?, ctx: integer?, kv: string?, queue: integer?,
---  cache_bytes: integer?, session: moonlet.Session? }? sequences at once (4), tokens of room for
---  each, codec of their cache, tickets that may wait for one (64), memory for kept states (1 GiB);
---  or a session to use instead of opening some, which stays open and whose content counts as kept
---@return moonlet.Engine? engine, string? message, string? code
function engine.open(model, loop, given)
  local o = options.check(given, KNOWN)
  local self = setmetatable({ model = model, loop = loop, free = {}, active = {}, waiting = {},
    n_waiting_max = o.queue or 64, work = loop:signal(), idle = loop:signal(),
    cache = prefix_cache.open(model, o.cache_bytes or 1 << 30),
    stats = { prompt_tokens = 0, cached_tokens = 0, generated_tokens = 0, batches = 0 } }, Engine)
  local ok, message, code = open_sessions(self, o)
  if not ok then
    self:close()
    return nil, message, code
  end
  self.n_ctx = self.free[1]:n_ctx()
  loop:spawn(Engine.run, self)
  return self
end

---Tickets that are being worked on, and that wait.
---@return integer active, integer waiting
function Engine:load()
  return #self.active, #self.waiting
end

---Whether a ticket would be refused now.
---@return boolean
function Engine:is_full()
  return #self.waiting >= #self.free + self.n_waiting_max
end

---How much of the memory for kept states is in use; 1 is all of it.
---@return number
function Engine:cache_usage()
  local cache = self.cache
  return cache.budget > 0 and cache:used() / cache.budget or 1.0
end

local function queue(self, ticket)
  if self:is_full() then return nil, "too many requests wait", "busy" end
  ticket.engine, ticket.queue, ticket.evaluated = self, ticket_queue.queue(), 0
  ticket.changed = self.loop:signal()
  self.waiting[#self.waiting + 1] = ticket
  self.work:notify()
  return setmetatable(ticket, Ticket)
end

---Queues a text to be scored, with a ticket that has no tokens: when it has ended with "stop", the
---score is complete.
---@param given { ids: integer[], score: userdata } of Model:scoring with all of the ids
---@return moonlet.Ticket? ticket, string? message, string? code as of submit()
function Engine:score(given)
  if #given.ids == 0 then return nil, "the text is empty", "range" end
  if #given.ids > self.n_ctx then
    return nil, ("a text of %d tokens does not fit in a context of %d"):format(#given.ids,
      self.n_ctx), "limit"
  end
  return queue(self, { ids = given.ids, score = given.score })
end

---Queues a prompt.
---@param given { ids: integer[], options: table?, keep_at: integer[]? } `options` are those of
---  Session:generate; the state is kept after as many tokens as keep_at says, rising, for prompts
---  that share that much
---@return moonlet.Ticket? ticket
---@return string? message
---@return string? code "limit" when the prompt is too long; "busy" when too many wait
function Engine:submit(given)
  local ids = given.ids
  if #ids == 0 then return nil, "the prompt is empty", "range" end
  if #ids >= self.n_ctx then
    return nil, ("a prompt of %d tokens leaves no room in a context of %d"):format(#ids,
      self.n_ctx), "limit"
  end
  return queue(self, { ids = ids, options = given.options or {}, keep_at = given.keep_at or {} })
end

local function remove(list, item)
  for i, other in ipairs(list) do
    if other == item then return table.remove(list, i) end
  end
end

-- Whether somebody who still waits would lose what the batch has done for him.
local function is_shared(self)
  for _, ticket in ipairs(self.active) do
    if ticket.in_job and not ticket.cancelled then return true end
  end
  return false
end

-- A batch with a piece of a prompt takes long; a decode step does not. Those who share batches
-- with many that leave would never get on: behind one that was cut the next runs to its end.
local function is_worth_cutting(self, ticket)
  return self.job and ticket.in_job and not ticket.generation
    and not (self.was_cut and is_shared(self))
end

function Engine:on_cancel(ticket)
  if remove(self.waiting, ticket) then
    end_ticket(ticket, "cancelled")
  elseif is_worth_cutting(self, ticket) then
    self.job:cancel()
  end
  self.work:notify()
end

-- ---- sequences ---------------------------------------------------------------------------------

local function n_common(a, b)
  local n = 0
  while n < #b and a[n + 1] == b[n + 1] do n = n + 1 end
  return n
end

-- Whether states are kept of a prompt that has not been read to its end.
local function is_reading(ticket)
  return ticket.session and not ticket.score and ticket.position < #ticket.ids
end

-- Of the free sessions the one that loses least of what it holds, and how many of the ids it holds,
-- which is all of it, or 0.
local function take_session(self, ids)
  local best, least, most = 1, math.huge, 0
  for i, session in ipairs(self.free) do
    local held = session:ids()
    local common = n_common(ids, held)
    local lost = #held - common
    if lost < least or lost == least and common > most then
      best, least, most = i, lost, common
    end
  end
  return table.remove(self.free, best), least == 0 and most or 0
end

-- Goes on from the last state that is kept.
local function find_state(self, ticket, n_held)
  local n = self.cache:restore(ticket.session, ticket.ids, n_held)
  self.stats.cached_tokens = self.stats.cached_tokens + n - ticket.reused
  ticket.position, ticket.reused = n, n
  ticket.points = prefix_cache.points(#ticket.ids, n, ticket.keep_at)
end

-- Who came before, has most in common with this prompt behind what is kept of it, and is on the way
-- to a state that is kept for both.
local function find_ahead(self, ticket)
  ticket.n_shared = ticket.position
  for _, other in ipairs(self.active) do
    if other == ticket then break end
    local n = is_reading(other) and n_common(other.ids, ticket.ids) or 0
    if n > ticket.n_shared and n >= other.points[1] then
      ticket.ahead, ticket.n_shared = other, n
    end
  end
end

-- Goes on, maybe behind somebody else, when the one ahead has read all that is kept for both.
local function follow(self, ticket)
  local ahead, before = ticket.ahead, ticket.position
  if not ahead or is_reading(ahead) and ticket.n_shared >= ahead.points[1] then return end
  ticket.ahead = nil
  find_state(self, ticket, before)
  if ticket.position > before then find_ahead(self, ticket) end
end

local function admit(self)
  while #self.free > 0 and #self.waiting > 0 do
    local ticket = table.remove(self.waiting, 1)
    local session, n_held = take_session(self, ticket.ids)
    ticket.session, ticket.reused = session, 0
    if ticket.score then -- each of its tokens has to be seen
      session:reset()
      ticket.position, ticket.points = 0, { #ticket.ids }
    else
      find_state(self, ticket, n_held)
      find_ahead(self, ticket)
    end
    self.stats.prompt_tokens = self.stats.prompt_tokens + #ticket.ids
    self.active[#self.active + 1] = ticket
  end
end

local function leave(self, ticket, reason, message, code)
  remove(self.active, ticket)
  if ticket.generation then
    ticket.generation:close()
    ticket.stop_id = ticket.generation.stop_id
    -- Everything the session holds, for whoever goes on from here.
    local held = ticket.session:ids()
    if #held > #ticket.ids then self.cache:put(ticket.session, held) end
  elseif reason == "cancelled" and ticket.position > ticket.reused then
    self.cache:put(ticket.session, ticket.ids, ticket.position) -- for whoever tries again
  end
  self.free[#self.free + 1] = ticket.session
  ticket.session = nil
  end_ticket(ticket, reason, message, code)
end

-- The next token of a generation, from logits that are there. A stage of the sampler that raises
-- ends its own generation only.
local function sample(self, ticket)
  local ok, token, message, code = xpcall(ticket.generation.next, debug.traceback,
    ticket.generation)
  if not ok then return leave(self, ticket, "error", token, "raised") end
  if token then
    self.stats.generated_tokens = self.stats.generated_tokens + 1
    ticket:push(token)
    ticket.changed:notify()
  end
  local reason = ticket.generation.finish_reason
  if reason then leave(self, ticket, reason, message, code) end
end

local function begin_generation(self, ticket)
  local ok, generation = pcall(generate.tokens, ticket.session, ticket.options)
  if not ok then return leave(self, ticket, "error", tostring(generation), "range") end
  ticket.generation = generation
  sample(self, ticket)
end

-- ---- batches -----------------------------------------------------------------------------------

-- A part for each sequence that can go on: one token of those that generate, then pieces of prompts
-- as far as there is room, which these share: a short one does not wait for a long one's end.
local function plan(self)
  local is_alone = #self.active == 1 and #self.waiting == 0
  local parts, tickets, room, n_reading = {}, {}, is_alone and ALONE or BATCH, 0
  local function add(ticket, ids)
    parts[#parts + 1] = { session = ticket.session, ids = ids, score = ticket.score }
    tickets[#tickets + 1] = ticket
    room = room - #ids
  end
  for _, ticket in ipairs(self.active) do
    local pending = ticket.generation and ticket.generation.pending
    if pending then add(ticket, { pending }) end
    if not ticket.generation and not ticket.ahead then n_reading = n_reading + 1 end
  end
  local others_wait = #parts > 0
  if others_wait then room = math.min(room, SHARED) end
  for _, ticket in ipairs(self.active) do
    if not ticket.generation and not ticket.ahead then
      local share = math.min(room, math.max(1, room // n_reading))
      if ticket.score and others_wait then share = math.min(share, SCORED) end
      local stop = math.min(ticket.points[1], ticket.position + share)
      if share > 0 then add(ticket, table.move(ticket.ids, ticket.position + 1, stop, 1, {})) end
      n_reading = n_reading - 1
    end
  end
  return parts, tickets
end

local function digest(self, ticket, n)
  if ticket.generation then
    ticket.generation.pending = nil
    return sample(self, ticket)
  end
  ticket.position = ticket.position + n
  ticket.evaluated = ticket.evaluated + n
  if ticket.score then
    if ticket.position == #ticket.ids then leave(self, ticket, "stop") end
    return
  end
  if ticket.position == ticket.points[1] then
    table.remove(ticket.points, 1)
    self.cache:put(ticket.session, ticket.ids, ticket.position)
  end
  if ticket.position == #ticket.ids then begin_generation(self, ticket) end
end

local function evaluate(self, parts, tickets)
  local job, message, code = self.model:start(parts)
  if not job then return nil, message, code end
  self.job = job
  for _, ticket in ipairs(tickets) do ticket.in_job = true end
  -- It gives way in any case: whoever takes tokens has had the last ones before the next.
  if job:is_done() then self.loop:sleep(0) else self.loop:ready(job:fd()) end
  local ok
  ok, message, code = job:result()
  self.job, self.was_cut = nil, code == "cancelled" and is_shared(self)
  for _, ticket in ipairs(tickets) do ticket.in_job = false end
  self.stats.batches = self.stats.batches + 1
  return ok, message, code
end

local function drop_cancelled(self)
  for i = #self.active, 1, -1 do
    if self.active[i].cancelled then leave(self, self.active[i], "cancelled") end
  end
end

-- The engine's own coroutine.
function Engine:run()
  while not self.closed do
    drop_cancelled(self)
    admit(self)
    for _, ticket in ipairs(table.move(self.active, 1, #self.active, 1, {})) do
      follow(self, ticket)
      if not ticket.generation and ticket.position == #ticket.ids then
        begin_generation(self, ticket) -- all of it was kept
      end
    end
    local parts, tickets = plan(self)
    if #parts > 0 then
      local ok, message, code = evaluate(self, parts, tickets)
      if self.closed then return end
      for i, ticket in ipairs(tickets) do
        if ok then
          digest(self, ticket, #parts[i].ids)
        elseif code ~= "cancelled" then
          leave(self, ticket, "error", message, code)
        end
      end
    elseif #self.active == 0 and #self.waiting == 0 then
      self.idle:notify()
      self.work:wait()
    end
  end
end

---Waits until nothing is active and nothing waits.
---@param seconds? number
---@return boolean idle false when the time was over
function Engine:drain(seconds)
  if #self.active == 0 and #self.waiting == 0 then return true end
  return self.idle:wait(seconds)
end

---Ends everything.
function Engine:close()
  self.closed = true
  for _, ticket in ipairs(self.waiting) do end_ticket(ticket, "cancelled") end
  for _, ticket in ipairs(self.active) do end_ticket(ticket, "cancelled") end
  self.waiting = {}
  if self.job then self.job:close() end
  self.cache:close()
  if not self.keeps_session then
    for _, ticket in ipairs(self.active) do ticket.session:close() end
    for _, session in ipairs(self.free) do session:close() end
  end
  self.active, self.free = {}, {}
  self.work:notify()
end

Engine.__close = Engine.close

return engine
