--- Coroutines over one event loop: connections, background computation and timers side by side.
---
---   local loop <close> = assert(sched.open())
---   loop:spawn(function() loop:sleep(1); print("later") end)
---   loop:run()
---
--- Everything runs on one thread; a coroutine gives way only where it waits, and in what it runs
--- gently. Waiting happens in sleep, ready and in a signal's wait; each returns when its time is
--- over or it was woken.

local core = require "moonlet.core"
local options = require "moonlet.options"
local watch = require "moonlet.watch"

local sched = {}

local TURN <const> = 0.005 -- seconds; a coroutine that computes gently then lets the others go on
local EVENTS <const> = 64  -- that a turn takes up

-- What a coroutine hands out that waits; one that computes gently hands out nothing.
local WAITS <const> = {}

---@class moonlet.Loop
---@field turn_seconds number how long a coroutine may compute gently before others have their turn
---@field net userdata  moonlet.core's event loop and HTTP server
---@field on_request? fun(request)  for each request, in a coroutine of its own
---@field on_gone? fun(request)     when the client of a request has left
---@field on_half? fun(request)     when its client sends no more: it may have left
---@field on_signal? fun(number)    when a signal that is caught has come
---@field on_error fun(text)        when a coroutine raises; by default the loop raises
local Loop = {}
Loop.__index = Loop

local LIMITS <const> = { header_bytes = "integer", body_bytes = "integer",
  total_bytes = "integer", pending_bytes = "integer", connections = "integer",
  grace_seconds = "number", idle_seconds = "number", request_seconds = "number",
  write_seconds = "number" }

---@param limits? table of the HTTP server: header_bytes, body_bytes, total_bytes, pending_bytes,
---  connections, grace_seconds, idle_seconds, request_seconds, write_seconds
---@return moonlet.Loop? loop, string? message, string? code
function sched.open(limits)
  local net, message, code = core.net_open(options.check(limits, LIMITS))
  if not net then return nil, message, code end
  return setmetatable({
    net = net,
    ready_list = {},  -- coroutines that can go on, first come first served
    timers = {},      -- waiters, a heap by their time
    readers = {},     -- fd -> coroutine
    turn_seconds = TURN,
    on_error = function(text) error(text, 0) end,
  }, Loop)
end

-- ---- timers: a binary heap of waiters, earliest first -------------------------------------------

local function put(heap, i, waiter)
  heap[i], waiter.index = waiter, i
end

-- Puts a waiter into the free place i, or where it belongs above or below of it.
local function sift(heap, i, waiter)
  while i > 1 and heap[i // 2].at > waiter.at do
    put(heap, i, heap[i // 2])
    i = i // 2
  end
  while true do
    local child = 2 * i
    if child < #heap and heap[child + 1].at < heap[child].at then child = child + 1 end
    if child > #heap or heap[child].at >= waiter.at then break end
    put(heap, i, heap[child])
    i = child
  end
  put(heap, i, waiter)
end

local function heap_add(heap, waiter)
  heap[#heap + 1] = waiter
  sift(heap, #heap, waiter)
end

local function heap_remove(heap, waiter)
  local last = table.remove(heap)
  if last ~= waiter then sift(heap, waiter.index, last) end
  waiter.index = nil
end

-- ---- coroutines --------------------------------------------------------------------------------

local function resume(self, thread, ...)
  local began = core.seconds()
  local ok, what = watch.resume(thread, ...)
  while ok and what ~= WAITS and coroutine.status(thread) == "suspended" do
    if core.seconds() - began >= self.turn_seconds then
      self.ready_list[#self.ready_list + 1] = { thread = thread, args = { n = 0 } }
      return
    end
    ok, what = watch.resume(thread)
  end
  if ok then return end
  local text = debug.traceback(thread, tostring(what))
  coroutine.close(thread)
  self.on_error(text)
end

local GENTLE <const> = setmetatable({}, { __close = function() core.give_way(true) end })

---fn as what runs in one piece between its waits, also in a coroutine that computes gently: for
---what changes things that coroutines share, or looks at them and then waits.
---@param fn function
---@return function
function sched.in_one_piece(fn)
  return function(...)
    local _ <close> = core.give_way(false) and GENTLE or nil
    return fn(...)
  end
end

local in_one_piece <const> = sched.in_one_piece

---Runs fn(...) as a coroutine, from the next turn of the loop on.
---@param fn function
function Loop:spawn(fn, ...)
  local thread = coroutine.create(fn)
  self.ready_list[#self.ready_list + 1] = { thread = thread, args = table.pack(...) }
end
Loop.spawn = in_one_piece(Loop.spawn)

local function wake(self, waiter, value)
  if waiter.done then return end
  waiter.done = true
  if waiter.index then heap_remove(self.timers, waiter) end
  self.ready_list[#self.ready_list + 1] = { thread = waiter.thread, args = { n = 1, value } }
end

-- Gives way until wake() or the end of `seconds`; true if it was woken.
local function pause(self, waiter, seconds)
  waiter.thread = coroutine.running()
  if seconds then
    waiter.at = core.seconds() + seconds
    heap_add(self.timers, waiter)
  end
  return coroutine.yield(WAITS)
end

local function with_place(problem)
  return type(problem) == "string" and debug.traceback(problem, 2) or problem
end

---Runs fn(...) so that others have their turn meanwhile: for long computations. Others may change
---what it shares with them at any moment.
---@param fn function
---@return any what fn returns
function Loop.gently(_, fn, ...)
  local is_ours = core.give_way(true)
  local results = table.pack(xpcall(fn, with_place, ...))
  if is_ours then core.give_way(false) end
  if not results[1] then error(results[2], 0) end
  return table.unpack(results, 2, results.n)
end

-- Among the times of timers NaN is neither early nor late: they would be in no order.
local function check_seconds(seconds)
  if type(seconds) ~= "number" or seconds ~= seconds then
    options.misuse("seconds expected, got " .. tostring(seconds))
  end
end

---@param seconds number
function Loop:sleep(seconds)
  check_seconds(seconds)
  pause(self, {}, seconds)
end
Loop.sleep = in_one_piece(Loop.sleep)

-- A coroutine that waits for a descriptor; it may end by an error that is raised into it.
local Reader = {}

function Reader:__close()
  self.loop.net:unwatch(self.fd)
  self.loop.readers[self.fd] = nil
end

---Waits until a descriptor can be read. One coroutine waits for one descriptor.
---@param fd integer
---@param seconds? number
---@return boolean ready false when the time was over
function Loop:ready(fd, seconds)
  if seconds ~= nil then check_seconds(seconds) end
  local ok, message = self.net:watch(fd)
  if not ok then error(message, 0) end
  local waiter <close> = setmetatable({ loop = self, fd = fd }, Reader)
  self.readers[fd] = waiter
  return (pause(self, waiter, seconds))
end
Loop.ready = in_one_piece(Loop.ready)

---@class moonlet.Signal
local Signal = {}
Signal.__index = Signal

---Something to wait for that others tell of.
---@return moonlet.Signal
function Loop:signal()
  return setmetatable({ loop = self, waiters = {} }, Signal)
end

---Waits for the next notify.
---@param seconds? number
---@return boolean notified false when the time was over
function Signal:wait(seconds)
  if seconds ~= nil then check_seconds(seconds) end
  local waiter = {}
  self.waiters[waiter] = true
  local notified = pause(self.loop, waiter, seconds)
  self.waiters[waiter] = nil
  return notified
end
Signal.wait = in_one_piece(Signal.wait)

---Wakes everybody who waits now.
function Signal:notify()
  local waiters = self.waiters
  self.waiters = {}
  for waiter in pairs(waiters) do wake(self.loop, waiter, true) end
end
Signal.notify = in_one_piece(Signal.notify)

-- ---- the loop ----------------------------------------------------------------------------------

local function run_ready(self)
  local list = self.ready_list
  self.ready_list = {}
  for _, item in ipairs(list) do
    resume(self, item.thread, table.unpack(item.args, 1, item.args.n))
  end
end

local function run_timers(self)
  local now = core.seconds()
  while self.timers[1] and self.timers[1].at <= now do
    wake(self, self.timers[1], false)
  end
end

local handlers = {}

function handlers.request(self, request)
  if self.on_request then
    self:spawn(self.on_request, request)
  else
    request:close()
  end
end

function handlers.gone(self, request)
  if self.on_gone then self:spawn(self.on_gone, request) end
end

function handlers.half(self, request)
  if self.on_half then self:spawn(self.on_half, request) end
end

function handlers.ready(self, fd)
  if self.readers[fd] then wake(self, self.readers[fd], true) end
end

function handlers.signal(self, number)
  if self.on_signal then self:spawn(self.on_signal, number) end
end

-- All that have come, as each turn may take a while; waits for the first one.
local function take_events(self, seconds)
  for _ = 1, EVENTS do
    local kind, what, code = self.net:wait(seconds)
    if kind then
      handlers[kind](self, what)
    elseif what then
      return nil, what, code
    else
      break
    end
    seconds = 0
  end
  return true
end

---Runs until stop() is called.
---@return boolean? ok, string? message, string? code
function Loop:run()
  self.stopped = false
  while not self.stopped do
    run_ready(self)
    run_timers(self)
    if self.stopped then break end
    local seconds
    if #self.ready_list > 0 then
      seconds = 0
    elseif self.timers[1] then
      seconds = math.max(0, self.timers[1].at - core.seconds())
    end
    local ok, message, code = take_events(self, seconds)
    if not ok then return nil, message, code end
  end
  return true
end

---Lets run() return once the coroutine that calls this gives way.
function Loop:stop()
  self.stopped = true
end

function Loop:close()
  self.net:close()
end

Loop.__close = Loop.close

return sched
