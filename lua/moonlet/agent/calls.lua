--- The tool calls of one turn: checked, permitted, run side by side, each with a result whatever
--- happens, as the model has to be told.

local clip = require "moonlet.clip"
local hooks = require "moonlet.agent.hooks"
local json = require "moonlet.json"
local sys = require "moonlet.sys"
local validate = require "moonlet.validate"
local watch = require "moonlet.watch"

local calls = {}

local HOOK_STEPS <const> = 10000 -- of Lua between looks at the clock
local CLOSING_STEPS <const> = 1000
local STOP_SECONDS <const> = 3    -- for a tool to stop when nobody waits for it any more
local GIVEN_UP <const> = setmetatable({}, { __tostring = function() return "given up" end })

---@class moonlet.ToolContext
---@field agent moonlet.Agent
---@field call { id: string, name: string, arguments: table }
---@field loop moonlet.Loop for what takes time: loop:sleep, loop:ready, moonlet.process
---@field is_cancelled fun(): boolean nobody waits for the result any more
---@field on_cancel fun(fn: function) runs fn when that happens, at once if it has

---@class moonlet.ToolResult
---@field content string
---@field is_error boolean

local function failure(text)
  return { content = "Error: " .. text, is_error = true }
end

-- What went wrong. Where a table lies in memory tells nobody anything.
local function explain(problem)
  if type(problem) == "string" then return problem end
  local ok, text = pcall(tostring, problem)
  if ok and not text:find(": 0x", 1, true) then return text end
  return ("(error object is a %s value)"):format(type(problem))
end

local function first_line(problem)
  return explain(problem):match("^[^\n]*")
end

-- What a tool answered, as a text; raises for what JSON has no value for.
local function spell(value)
  if type(value) == "string" then return value end
  return value == nil and "ok" or json.encode(value)
end

local function read_answer(returned)
  if not returned[1] then
    local problem = returned[2]
    if problem == GIVEN_UP then return nil end
    return failure("the tool failed: " .. first_line(problem))
  end
  if returned[2] == nil and returned[3] ~= nil then return failure(explain(returned[3])) end
  local ok, text = pcall(spell, returned[2])
  if not ok then return failure("the tool's result is no JSON value") end
  return { content = text, is_error = false }
end

-- ---- one tool at work --------------------------------------------------------------------------

-- Runs a tool in this coroutine. Lua that never gives way is stopped where it is, in a coroutine of
-- its own, too. Where it catches that, it has some steps to close what it has open; then each
-- further one raises, so that no pcall around the work holds it.
local function work(job, tool, ctx)
  local thread, steps = coroutine.running(), CLOSING_STEPS
  local function look()
    if not job.deadline or sys.seconds() <= job.deadline then return nil end
    local given = steps
    steps = 1
    return GIVEN_UP, given
  end
  local function run()
    local returned = table.pack(true, tool.run(ctx.call.arguments, ctx))
    watch.set(thread, 0)
    return returned
  end
  local function fail(problem)
    watch.set(thread, 0)
    return { false, problem }
  end
  watch.set(thread, HOOK_STEPS, look)
  job.returned = select(2, xpcall(run, fail))
  job.changed:notify()
end

-- Tells a tool that nobody waits for it any more. What that raises comes back, when all are told.
local function abandon(batch, job)
  local problem
  job.is_abandoned, job.deadline = true, sys.seconds() + STOP_SECONDS
  if not job.returned then batch.agent.abandoned[#batch.agent.abandoned + 1] = job end
  for _, fn in ipairs(job.on_cancel) do
    local ok, message = pcall(fn)
    if not ok then problem = problem or message end
  end
  return problem
end

local function run_tool(batch, tool, call)
  local agent, seconds = batch.agent, tool.seconds
  if seconds == nil then seconds = agent.tool_seconds end
  local job = { changed = agent.loop:signal(), on_cancel = {},
    deadline = seconds and sys.seconds() + seconds or nil }
  local ctx = { agent = agent, call = call, loop = agent.loop,
    is_cancelled = function() return job.is_abandoned or false end,
    on_cancel = function(fn)
      if job.is_abandoned then return fn() end
      job.on_cancel[#job.on_cancel + 1] = fn
    end }
  agent.jobs[job] = true
  agent.loop:spawn(work, job, tool, ctx)
  local in_time = true
  while in_time and not (job.returned or agent.cancelled or batch.problem) do
    in_time = job.changed:wait(job.deadline and math.max(0, job.deadline - sys.seconds()))
  end
  agent.jobs[job] = nil
  local result = job.returned and read_answer(job.returned)
  if result then return result end
  local problem = abandon(batch, job)
  if problem then return failure("the tool cannot be stopped: " .. first_line(problem)) end
  if agent.cancelled then return failure("the user interrupted the tool") end
  if batch.problem then return failure("the tool was interrupted") end
  return failure(("the tool was given up after %g s"):format(seconds))
end

---Tells the tools that run to look up.
function calls.wake(agent)
  for job in pairs(agent.jobs) do job.changed:notify() end
end

---Waits until the tools that were given up or interrupted have stopped, a short while at most.
function calls.settle(agent)
  for _, job in ipairs(agent.abandoned) do
    local in_time = true
    while in_time and not job.returned do
      in_time = job.changed:wait(math.max(0, job.deadline - sys.seconds()))
    end
  end
  agent.abandoned = {}
end

-- ---- one call ----------------------------------------------------------------------------------

-- What speaks against a call, as its result.
local function refuse(agent, tool, call)
  if not tool then
    return failure(("there is no tool '%s'; there are %s"):format(call.name,
      table.concat(agent.tool_names, ", ")))
  end
  local ok, message = validate.check(call.arguments, tool.parameters or true, "arguments")
  if not ok then return failure(message) end
  local result, reason = hooks.before_tool(agent, call, tool)
  if result then return result end
  reason = reason or hooks.ask(agent, call, tool)
  return reason and failure(reason)
end

-- Answers one call. The call that hooks and tools see is a copy: what was said stays as it was.
local function answer(batch, part)
  local agent = batch.agent
  local tool = agent.tools_by_name[part.name]
  local call = { id = part.id, name = part.name,
    arguments = json.decode(json.encode(part.arguments)) }
  local result = refuse(agent, tool, call) or run_tool(batch, tool, call)
  result.content = clip.text(result.content, batch.most_bytes)
  return hooks.after_tool(agent, call, result)
end

-- ---- all calls of a turn -----------------------------------------------------------------------

-- Calls that may run side by side follow each other in one group.
local function groups_of(agent, list)
  local groups, open = {}, nil
  for i, part in ipairs(list) do
    local tool = agent.tools_by_name[part.name]
    local alone = tool and tool.parallel == false
    if alone or not open then
      open = {}
      groups[#groups + 1] = open
    end
    open[#open + 1] = i
    if alone then open = nil end
  end
  return groups
end

-- The result of call i. What a hook or on_result raises is the run's to raise, and ends the other
-- calls.
local function take_call(batch, i)
  if batch.agent.cancelled then return failure("the user interrupted before this call") end
  if batch.problem then return failure("the call was not run") end
  local part, result = batch.list[i], nil
  local ok, problem = xpcall(function()
    result = answer(batch, part)
    batch.on_result(part, result)
  end, debug.traceback)
  if not ok then
    batch.problem = batch.problem or problem
    calls.wake(batch.agent)
  end
  return result or failure("a hook failed, and this call has no result")
end

-- Runs the calls of a group, as many at a time as the agent permits.
local function run_group(batch, group)
  local loop = batch.agent.loop
  local changed, n_begun, n_ended = loop:signal(), 0, 0
  local function take_calls()
    while n_begun < #group do
      n_begun = n_begun + 1
      local i = group[n_begun]
      batch.results[i] = take_call(batch, i)
      n_ended = n_ended + 1
    end
    changed:notify()
  end
  for _ = 1, math.min(#group, batch.agent.parallel) do loop:spawn(take_calls) end
  while n_ended < #group do changed:wait() end
end

---@param agent moonlet.Agent
---@param list table[] parts of moonlet.turn of kind "call"
---@param on_result fun(part: table, result: moonlet.ToolResult) as they come
---@return moonlet.ToolResult[] results in the order of the calls
---@return string? problem what a hook or on_result raised
function calls.run(agent, list, on_result)
  -- What one call may answer with fits in the context; that many may, only if they share.
  local share = math.max(agent.turn_bytes // math.max(#list, 1), 1)
  local batch = { agent = agent, list = list, on_result = on_result, results = {},
    most_bytes = math.min(agent.result_bytes, share) }
  for _, group in ipairs(groups_of(agent, list)) do run_group(batch, group) end
  return batch.results, batch.problem
end

return calls
