--- The tool calls of one turn: checked, permitted, run side by side, each with a result whatever
--- happens, as the model has to be told.

local clip = require "moonlet.clip"
local hooks = require "moonlet.agent.hooks"
local json = require "moonlet.json"
local options = require "moonlet.options"
local sys = require "moonlet.sys"
local validate = require "moonlet.validate"
local watch = require "moonlet.watch"

local calls = {}

local HOOK_STEPS <const> = 10000 -- of Lua between looks at the clock
local STOP_SECONDS <const> = 3   -- for a tool to stop when nobody waits for it any more

---@class moonlet.ToolContext
---@field agent moonlet.Agent
---@field call { id: string, name: string, arguments: table }
---@field loop moonlet.Loop for what takes time: loop:sleep, loop:ready, moonlet.process. What it
---  spawns belongs to the call
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

local function read_answer(ok, answer, problem)
  if not ok then return failure("the tool failed: " .. first_line(answer)) end
  if answer == nil and problem ~= nil then return failure(explain(problem)) end
  local text
  ok, text = pcall(spell, answer)
  if not ok then return failure("the tool's result is no JSON value") end
  return { content = text, is_error = false }
end

-- ---- one tool at work --------------------------------------------------------------------------

-- Calls fn, which runs what is the tool's in a pcall: what it returns, or nothing and true when the
-- job's time was over before. Lua that never gives way is stopped where it is.
local function within(job, fn, ...)
  local is_over = false
  local ok, value = watch.pcall(HOOK_STEPS, function()
    is_over = is_over or job.deadline ~= nil and sys.seconds() > job.deadline
    return is_over
  end, fn, ...)
  if is_over then return nil, true end
  if not ok then error(value, 0) end
  return value
end

-- What a tool answers is read with functions of its own, too.
local function answer_of(tool, ctx)
  return read_answer(pcall(tool.run, ctx.call.arguments, ctx))
end

-- What has outlived its call has its own time.
local function work(job, tool, ctx)
  local result = within(job, answer_of, tool, ctx)
  job.result = job.result or result
  job.has_ended = true
  if result and not job.is_abandoned then job.deadline = nil end
  job.changed:notify()
end

-- Waits for what a job tells of, until its time is over.
local function wait_for(job, is_there)
  local in_time = true
  while in_time and not is_there() do
    in_time = job.changed:wait(job.deadline and math.max(0, job.deadline - sys.seconds()))
  end
end

local function problem_of(fn)
  local ok, problem = pcall(fn)
  return not ok and first_line(problem) or nil
end

-- What a tool has spawned has failed: so has its call, as long as that can be told. Else the run
-- tells of it, which is the one to raise what is wrong with `on`.
local function take_problem(agent, job, call, problem)
  if not (job.has_ended or job.is_abandoned) then
    job.result = job.result or failure("the tool failed: " .. problem)
    job.changed:notify()
  else
    agent.notes[#agent.notes + 1] = ("what the tool %s has left running failed: %s")
      :format(call.name, problem)
  end
end

-- The loop as a tool has it: what it spawns there is the call's, not the agent's.
local function loop_of(agent, job, call)
  local own = {}
  function own.spawn(_, fn, ...)
    local args = table.pack(...)
    agent.loop:spawn(function()
      local problem = within(job, problem_of, function()
        fn(table.unpack(args, 1, args.n))
      end)
      if problem then take_problem(agent, job, call, problem) end
    end)
  end
  return setmetatable(own, { __index = agent.loop })
end

-- Tells a tool that nobody waits for it any more, and waits a short while until all is told. What
-- was wrong with that comes back.
local function abandon(agent, job)
  local problem, n_told = nil, 0
  job.is_abandoned, job.deadline = true, sys.seconds() + STOP_SECONDS
  if not job.has_ended then agent.abandoned[#agent.abandoned + 1] = job end
  for _, fn in ipairs(job.on_cancel) do
    agent.loop:spawn(function()
      local text, is_late = within(job, problem_of, fn)
      problem = problem or text or is_late and "what it told on_cancel takes too long"
      n_told = n_told + 1
      job.changed:notify()
    end)
  end
  wait_for(job, function() return n_told == #job.on_cancel end)
  return problem
end

local function run_tool(batch, tool, call)
  local agent, seconds = batch.agent, tool.seconds
  if seconds == nil then seconds = agent.tool_seconds end
  local job = { changed = agent.loop:signal(), on_cancel = {},
    deadline = seconds and sys.seconds() + seconds or nil }
  local ctx = { agent = agent, call = call, loop = loop_of(agent, job, call),
    is_cancelled = function() return job.is_abandoned or false end,
    on_cancel = function(fn)
      if type(fn) ~= "function" then
        options.misuse("on_cancel: a function expected, got " .. type(fn))
      end
      if job.is_abandoned then return fn() end
      job.on_cancel[#job.on_cancel + 1] = fn
    end }
  agent.jobs[job] = true
  agent.loop:spawn(work, job, tool, ctx)
  wait_for(job, function()
    return job.result or job.has_ended or agent.cancelled or batch.problem
  end)
  agent.jobs[job] = nil
  local result = job.result
  if result and job.has_ended then return result end
  local problem = abandon(agent, job)
  if result then return result end
  if problem then return failure("the tool cannot be stopped: " .. problem) end
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
    wait_for(job, function() return job.has_ended end)
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
  result = hooks.after_tool(agent, call, result)
  result.content = clip.valid(result.content)
  return result
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
