--- The tool calls of one turn: checked, permitted, run side by side, each with a result whatever
--- happens, as the model has to be told.

local clip = require "moonlet.clip"
local json = require "moonlet.json"
local sys = require "moonlet.sys"
local validate = require "moonlet.validate"

local calls = {}

local HOOK_STEPS <const> = 100000 -- of Lua between looks at the clock
local GIVEN_UP <const> = setmetatable({}, { __tostring = function() return "given up" end })

---@class moonlet.ToolContext
---@field agent moonlet.Agent
---@field call { id: string, name: string, arguments: table }
---@field loop moonlet.Loop for what takes time: loop:sleep, loop:ready, moonlet.process
---@field is_cancelled fun(): boolean nobody waits for the result any more
---@field on_cancel fun(fn: function) runs fn when that happens

---@class moonlet.ToolResult
---@field content string
---@field is_error boolean

local function failure(text)
  return { content = "Error: " .. text, is_error = true }
end

-- What a tool answered, as a text.
local function spell(value)
  if type(value) == "string" then return value end
  if value == nil then return "ok" end
  if type(value) ~= "table" then return tostring(value) end
  return json.encode(value)
end

local function read_answer(returned)
  if not returned[1] then
    local problem = returned[2]
    if problem == GIVEN_UP then return nil end
    return failure("the tool failed: " .. tostring(problem):match("^[^\n]*"))
  end
  if returned[2] == nil and returned[3] ~= nil then return failure(tostring(returned[3])) end
  local ok, text = pcall(spell, returned[2])
  if not ok then return failure("the tool's result is no JSON value") end
  return { content = text, is_error = false }
end

-- ---- one call ----------------------------------------------------------------------------------

-- Runs a tool in this coroutine. Lua that never gives way is stopped where it is.
local function work(job, tool, ctx)
  debug.sethook(function()
    if job.abandoned or job.deadline and sys.seconds() > job.deadline then error(GIVEN_UP, 0) end
  end, "", HOOK_STEPS)
  job.returned = table.pack(pcall(tool.run, ctx.call.arguments, ctx))
  debug.sethook()
  job.changed:notify()
end

local function abandon(job)
  job.abandoned = true
  for _, fn in ipairs(job.on_cancel) do fn() end
end

local function run_tool(agent, tool, call)
  local seconds = tool.seconds == nil and agent.tool_seconds or tool.seconds or nil
  local job = { changed = agent.loop:signal(), on_cancel = {},
    deadline = seconds and sys.seconds() + seconds }
  local ctx = { agent = agent, call = call, loop = agent.loop,
    is_cancelled = function() return job.abandoned or false end,
    on_cancel = function(fn) job.on_cancel[#job.on_cancel + 1] = fn end }
  agent.jobs[job] = true
  agent.loop:spawn(work, job, tool, ctx)
  local in_time = true
  while in_time and not job.returned and not agent.cancelled do
    in_time = job.changed:wait(job.deadline and math.max(0, job.deadline - sys.seconds()))
  end
  agent.jobs[job] = nil
  local result = job.returned and read_answer(job.returned)
  if result then return result end
  abandon(job)
  if agent.cancelled then return failure("the user interrupted the tool") end
  return failure(("the tool was given up after %g s"):format(seconds))
end

-- A hook's result in a tool's place is the model's next reading: it has to be text.
local function check_result(hook, result)
  if type(result) == "table" and type(result.content) == "string" then return result end
  error(("hook %s: a table with a text as content expected"):format(hook), 0)
end

-- What speaks against a call, as its result.
local function refuse(agent, tool, call)
  if not tool then
    return failure(("there is no tool '%s'; there are %s"):format(call.name,
      table.concat(agent.tool_names, ", ")))
  end
  local ok, message = validate.check(call.arguments, tool.parameters or true, "arguments")
  if not ok then return failure(message) end
  if agent.before_tool then
    local allowed, reason = agent.before_tool(call, tool)
    if allowed == false then return failure(reason or "the call was refused") end
    if type(allowed) == "table" then return check_result("before_tool", allowed) end
  end
  if tool.ask and agent.ask then
    local allowed, reason = agent.ask(call, tool)
    if allowed ~= true then return failure(reason or "the user refused this call") end
  end
end

---Answers one call, with so many bytes at most. The call that hooks and tools see is a copy: what
---was said stays as it was.
---@return moonlet.ToolResult
local function answer(agent, part, most)
  local tool = agent.tools_by_name[part.name]
  local call = { id = part.id, name = part.name,
    arguments = json.decode(json.encode(part.arguments)) }
  local result = refuse(agent, tool, call) or run_tool(agent, tool, call)
  result.content = clip.text(result.content, most)
  if not agent.after_tool then return result end
  return check_result("after_tool", agent.after_tool(call, result) or result)
end

-- ---- all calls of a turn -----------------------------------------------------------------------

-- Calls that may run side by side follow each other in one group.
local function groups_of(agent, list)
  local groups, open = {}, nil
  for i, part in ipairs(list) do
    local tool = agent.tools_by_name[part.name]
    local alone = tool and tool.parallel == false or not agent.parallel
    if alone or not open then
      open = {}
      groups[#groups + 1] = open
    end
    open[#open + 1] = i
    if alone then open = nil end
  end
  return groups
end

---@param agent moonlet.Agent
---@param list table[] parts of moonlet.turn of kind "call"
---@param on_result fun(part: table, result: moonlet.ToolResult) as they come
---@return moonlet.ToolResult[] results in the order of the calls
---@return string? problem what a hook or on_result raised
function calls.run(agent, list, on_result)
  local results, ended, problem = {}, {}, nil
  local changed = agent.loop:signal()
  -- What one call may answer with fits in the context; that many may, only if they share.
  local most = math.min(agent.result_bytes, math.max(agent.turn_bytes // math.max(#list, 1), 1))
  local function one(i)
    local ok, message = xpcall(function()
      results[i] = answer(agent, list[i], most)
      on_result(list[i], results[i])
    end, debug.traceback)
    if not ok then problem = problem or message end -- of a hook: the run's to raise
    results[i] = results[i] or failure("the call was not run")
    ended[i] = true
    changed:notify()
  end
  for _, group in ipairs(groups_of(agent, list)) do
    for _, i in ipairs(group) do
      if agent.cancelled then
        results[i], ended[i] = failure("the user interrupted before this call"), true
      else
        agent.loop:spawn(one, i)
      end
    end
    for _, i in ipairs(group) do
      while not ended[i] do changed:wait() end
    end
    if problem then break end
  end
  for i = 1, #list do results[i] = results[i] or failure("the call was not run") end
  return results, problem
end

return calls
