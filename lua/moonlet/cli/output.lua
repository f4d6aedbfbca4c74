--- What commands share: reading arguments, printing results, progress.
local json = require "moonlet.json"
local plan = require "moonlet.plan"
local sys = require "moonlet.sys"

local output = {}

---Raised for misuse that the parser cannot see; ends with exit code 2.
function output.misuse(text)
  error({ misuse = text })
end

---A converter for an option that takes an integer.
---@param name string as messages show it
---@param min? integer without it any integer will do
---@param max? integer
---@return fun(text: string): integer?, string?
function output.integer(name, min, max)
  local range = max and ("%d to %d"):format(min, max) or min and ("%d or more"):format(min)
    or "an integer"
  min = min or math.mininteger
  return function(text)
    local n = math.tointeger(tonumber(text))
    if n and n >= min and n <= (max or n) then return n end
    local whole = min > math.mininteger and output.fraction(text) and "a whole number, " or ""
    return nil, ("option '%s': %s%s expected, got '%s'"):format(name, whole, range, text)
  end
end

local UNITS <const> = { [""] = 0, K = 10, M = 20, G = 30, T = 40 }

---Whether a text is a number, but no whole one.
function output.fraction(text)
  local x = tonumber(text)
  return x ~= nil and x ~= x // 1
end

---A converter for an option that takes an amount of memory: "512M", "1.5G", "4GiB", bytes.
---@param name string as messages show it
---@param min integer bytes
---@return fun(text: string): integer?, string?
function output.size(name, min)
  return function(text)
    local number, unit = text:match("^(%d+%.?%d*)([KMGT]?)i?B?$")
    local n = number and tonumber(number) * 2.0 ^ UNITS[unit] // 1
    if n and n >= min and n < 2 ^ 62 then return math.tointeger(n) end
    return nil, ("option '%s': a size as 512M or 4G expected, got '%s'"):format(name, text)
  end
end

---A converter for an option that takes some text.
function output.some_text(name)
  return function(text)
    if text ~= "" then return text end
    return nil, ("option '%s': must not be empty"):format(name)
  end
end

---A converter for "A-B", "A-" or "A": items A to B, counted from 1.
---@return fun(text: string): integer[]?, string?
function output.range(name)
  return function(text)
    local first, dash, last = text:match("^(%d+)(%-?)(%d*)$")
    first, last = math.tointeger(tonumber(first)), math.tointeger(tonumber(last))
    if first and dash == "" then last = first end
    if first and first >= 1 and (last or first) >= first then return { first, last } end
    return nil, ("option '%s': A-B, A- or A expected, got '%s'"):format(name, text)
  end
end

---Token ids separated by commas or blanks.
---@return integer[]
function output.token_ids(text)
  local ids = {}
  for word in text:gmatch("[^%s,]+") do
    local id = word:find("^%-?%d+$") and math.tointeger(tonumber(word))
    if not id or math.abs(id) > 0x7fffffff then
      output.misuse(("'%s' is not a token id"):format(word))
    end
    ids[#ids + 1] = id
  end
  return ids
end

---Adds DIR, which may be left out, to a command.
function output.dir_argument(command)
  command:argument("dir", "checkpoint directory (default: the demo model)"):args("?")
end

---@return string dir
function output.dir(given)
  if given == "" then output.misuse("DIR must not be empty") end
  local dir = given or sys.data_dir("demo-model")
  if not dir then error("the demo model is not installed; name a checkpoint directory", 0) end
  return dir
end

---Adds --threads to a command.
function output.threads_option(command)
  command:option("--threads", "threads (default: all processors)"):argname("N")
    :convert(output.integer("--threads", 1, 1024))
end

---Adds --precision to a command.
function output.precision_option(command, default)
  command:option("--precision", "exact (f32 everywhere) or fast"):choices { "exact", "fast" }
    :default(default)
end

---Kernels, and why these.
---@param report table kernels, kernels_by and kernels_times, as model:info has them
---@return string
function output.kernels(report)
  if report.kernels_by == "environment" then return report.kernels .. ", as MOONLET_CPU says" end
  if report.kernels_by ~= "measurement" then return report.kernels end
  local others = {}
  for name, times in pairs(report.kernels_times) do
    if name ~= report.kernels then others[#others + 1] = { name = name, times = times } end
  end
  table.sort(others, function(a, b) return a.times < b.times end)
  for i, other in ipairs(others) do
    others[i] = ("%s %.2f"):format(other.name, other.times)
  end
  return ("%s, as measured; in times as long: %s"):format(report.kernels,
    table.concat(others, ", "))
end

function output.open_model(args)
  return require("moonlet").open(output.dir(args.dir),
    { threads = args.threads, precision = args.precision })
end

---Text of a file, or of standard input for "-".
function output.read_file(path)
  if path ~= "-" then return sys.read_file(path) end
  local text, message
  if sys.wait_input(0) then text, message = io.read("a") end
  if text then return text end
  if sys.interrupted() then return nil, "interrupted", "cancelled" end
  return nil, "standard input: " .. message, "io"
end

function output.read_json(path)
  local text, message, code = output.read_file(path)
  if not text then return nil, message, code end
  return json.decode(text, { name = path == "-" and "standard input" or path })
end

---Writes to standard output. A full disk ends the command; print() would not notice.
function output.write(...)
  local ok, message = io.write(...)
  if not ok then error("standard output: " .. message, 0) end
end

---What was written so far becomes visible.
function output.flush()
  local ok, message = io.stdout:flush()
  if not ok then error("standard output: " .. message, 0) end
end

---Writes a line.
function output.line(text)
  output.write(text, "\n")
end

-- Characters that steer a terminal instead of being shown: C0, DEL and C1, and those that turn the
-- order of what follows around (Unicode's Bidi_Control).
local LINE_STEERING <const> = { "[\0-\31\127]", "\xC2[\x80-\x9F]", "\xD8\x9C",
  "\xE2\x80[\x8E\x8F\xAA-\xAE]", "\xE2\x81[\xA6-\xA9]" }
local STEERING <const> = { "[\0-\8\11-\31\127]", table.unpack(LINE_STEERING, 2) }

local function spell_code(char)
  return ("\\u{%X}"):format(utf8.codepoint(char))
end

local function spelled(text, patterns)
  for _, pattern in ipairs(patterns) do text = text:gsub(pattern, spell_code) end
  return text
end

---A text from elsewhere that shows what it holds, over lines of its own, and does nothing else.
---@param text string in UTF-8
---@return string
function output.visible(text)
  return spelled(text, STEERING)
end

---The same, on one line.
function output.visible_line(text)
  return spelled(text, LINE_STEERING)
end

---Shows a piece of an answer at once; for generate's on_token. A terminal is not steered by it.
function output.stream(tok)
  output.write(sys.isatty(1) and output.visible(tok.text) or tok.text)
  output.flush()
end

function output.print_json(value)
  output.line(json.encode(value))
end

output.bytes = plan.size_text

output.count = plan.count_text

-- ---- progress -----------------------------------------------------------------------------------

---Adds --progress to a command.
function output.progress_option(command)
  command:flag("--progress", "show progress even if stderr is no terminal")
end

local shown = false

---"2 h 05 min", "3 min 20 s", "12 s".
function output.duration(seconds)
  if seconds >= 3600 then return ("%d h %02d min"):format(seconds // 3600, seconds % 3600 // 60) end
  if seconds >= 60 then return ("%d min %02d s"):format(seconds // 60, seconds % 60) end
  return ("%d s"):format(math.ceil(seconds))
end

-- "1.20 of 3.40 GiB, 412 MB/s": how much is done, and how fast since there were `first`.
local function amount(done, total, first, seconds)
  local text = (", %s of %s"):format(output.bytes(done), output.bytes(total))
  if seconds < 1 then return text end
  return ("%s, %.0f MB/s"):format(text, (done - first) / seconds / 1e6)
end

---A function (done, total) that keeps one line of stderr up to date; nil when nobody watches. What
---is done at its first call was done before.
---@param unit? "bytes"|"tokens"  shows amounts and their rate, too, or the rate
function output.progress(args, what, unit)
  local terminal = sys.isatty(2)
  if not (terminal or args.progress) then return nil end
  local start, last, first = sys.seconds(), -1, nil
  return function(done, total)
    local now = sys.seconds()
    first = first or done
    if done < total and now - last < (terminal and 0.2 or 2) then return end
    last = now
    local line = ("%s %3.0f %%"):format(what, total > 0 and done * 100 // total or 100)
    if unit == "bytes" then line = line .. amount(done, total, first, now - start) end
    if unit == "tokens" and done > first and now - start > 1 then
      local rate = (done - first) / (now - start)
      line = line .. (rate < 100 and ", %.3g tokens/s" or ", %.0f tokens/s"):format(rate)
    end
    if done > first and done < total and now - start > 1 then
      local rest = (now - start) * (total - done) / (done - first)
      line = ("%s, %s left"):format(line, output.duration(rest))
    end
    io.stderr:write(terminal and "\r\27[K" or "", line, terminal and "" or "\n")
    shown = terminal
    if done >= total then output.end_progress() end
  end
end

function output.end_progress()
  if shown then io.stderr:write("\r\27[K") end
  shown = false
end

return output
