--- Tools that run other programs: grep, and a shell.

local files = require "moonlet.tools.files"
local process = require "moonlet.process"
local trim = require "moonlet.trim"

local shell = {}

local GREP_BYTES <const>, GREP_SECONDS <const> = 32 << 10, 30
local BASH_BYTES <const> = 32 << 10
local BASH_SECONDS <const>, MAX_SECONDS <const> = 120, 3600

-- ---- grep --------------------------------------------------------------------------------------

local function grep(place, given, ctx)
  local path, message, code = place:resolve(given.path or ".")
  if not path then return nil, message, code end
  if (given.pattern .. (given.include or "")):find("\0", 1, true) then
    return nil, "pattern and include have no NUL bytes", "range"
  end
  local argv = { "grep", given.ignore_case and "-rnHIPi" or "-rnHIP", "--exclude-dir=.git" }
  if given.include then argv[#argv + 1] = "--include=" .. given.include end
  for _, word in ipairs { "-e", given.pattern, "--", place:shown(path) } do
    argv[#argv + 1] = word
  end
  local result
  result, message, code = process.run(ctx.loop, { argv = argv, cwd = place.root,
    seconds = GREP_SECONDS, bytes = GREP_BYTES, on_start = ctx.on_cancel })
  if not result then return nil, message, code end
  if result.timed_out then
    return nil, ("no end after %d s; search a smaller part"):format(GREP_SECONDS), "limit"
  end
  if result.code == 1 then return "[no matches]" end
  if result.code ~= 0 then return nil, trim.right(result.output), "range" end
  return trim.right(result.output)
end

function shell.grep(place)
  return { name = "grep", description = "Search files for a regular expression.",
    parameters = files.parameters({
      { "pattern", files.text "the regular expression (Perl's syntax)" },
      { "path", files.text "file or directory to search" },
      { "include", files.text "only files whose names fit this, such as *.c" },
      { "ignore_case", { type = "boolean" } },
    }, 1),
    run = function(given, ctx) return grep(place, given, ctx) end }
end

-- ---- bash --------------------------------------------------------------------------------------

-- What the model should know besides the output.
local function notes(result, seconds)
  if result.timed_out then
    return ("[stopped after %g s; what ran is killed]"):format(seconds)
  elseif result.signal then
    return ("[ended by signal %d]"):format(result.signal)
  elseif result.code ~= 0 then
    return ("[exit code %d]"):format(result.code)
  end
end

local function bash(place, given, ctx)
  local seconds = math.min(given.timeout or BASH_SECONDS, MAX_SECONDS)
  if given.command:find("\0", 1, true) then return nil, "a command has no NUL bytes", "range" end
  local result, message, code = process.run(ctx.loop, { cwd = place.root, seconds = seconds,
    argv = { "bash", "-c", "--", given.command }, bytes = BASH_BYTES, on_start = ctx.on_cancel })
  if not result then return nil, message, code end
  local output, note = trim.right(result.output), notes(result, seconds)
  if not note then return output ~= "" and output or "[no output]" end
  return nil, (output ~= "" and output .. "\n" or "") .. note, result.timed_out and "limit" or "io"
end

function shell.bash(place)
  return { name = "bash", description = "Run a shell command.", ask = true, parallel = false,
    seconds = false, -- it has its own limit
    parameters = files.parameters({
      { "command", files.text "the command" },
      { "timeout", { type = "number", exclusiveMinimum = 0,
        description = ("seconds until it is stopped, %d by default"):format(BASH_SECONDS) } },
    }, 1),
    run = function(given, ctx) return bash(place, given, ctx) end }
end

return shell
