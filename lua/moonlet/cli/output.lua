--- What commands share: reading arguments, printing results, progress.
local json = require "moonlet.json"
local sys = require "moonlet.sys"

local output = {}

---Raised for misuse that the parser cannot see; ends with exit code 2.
function output.misuse(text)
  error({ misuse = text })
end

---Adds DIR, which may be left out, to a command.
function output.dir_argument(command)
  command:argument("dir", "checkpoint directory (default: the demo model)"):args("?")
end

---@return string dir
function output.dir(given)
  local dir = given or sys.data_dir("demo-model")
  if not dir then error("the demo model is not installed; name a checkpoint directory", 0) end
  return dir
end

---Adds --threads to a command.
function output.threads_option(command)
  command:option("--threads", "threads (default: all processors)"):convert(math.tointeger)
    :argname("N")
end

---Adds --precision to a command.
function output.precision_option(command, default)
  command:option("--precision", "exact (f32 everywhere) or fast"):choices { "exact", "fast" }
    :default(default)
end

function output.open_model(args)
  local threads = args.threads
  if threads and (threads < 1 or threads > 1024) then
    output.misuse("option '--threads': 1 to 1024 expected")
  end
  return require("moonlet").open(output.dir(args.dir),
    { threads = threads, precision = args.precision })
end

---Text of a file, or of standard input for "-".
function output.read_file(path)
  if path == "-" then return io.read("a") end
  local file, message = io.open(path, "rb")
  if not file then return nil, message, "io" end
  local text = file:read("a")
  file:close()
  if not text then return nil, path .. ": cannot read", "io" end
  return text
end

function output.read_json(path)
  local text, message, code = output.read_file(path)
  if not text then return nil, message, code end
  return json.decode(text, { name = path })
end

function output.print_json(value)
  print(json.encode(value))
end

---"1.2 GB": decimal units, as disks and model cards count.
function output.bytes(n)
  local units = { "B", "kB", "MB", "GB", "TB" }
  local i = 1
  while n >= 1000 and i < #units do
    n = n / 1000
    i = i + 1
  end
  return (i == 1 and "%d %s" or "%.2f %s"):format(n, units[i])
end

---"1,234,567"
function output.count(n)
  local text = tostring(math.tointeger(n) or n)
  local groups = text:reverse():gsub("(%d%d%d)", "%1,"):reverse()
  return (groups:gsub("^,", ""))
end

-- ---- progress -----------------------------------------------------------------------------------

---Adds --progress to a command.
function output.progress_option(command)
  command:flag("--progress", "show progress even if stderr is no terminal")
end

local shown = false

local function left(seconds)
  if seconds >= 3600 then return ("%d h %02d min"):format(seconds // 3600, seconds % 3600 // 60) end
  if seconds >= 60 then return ("%d min %02d s"):format(seconds // 60, seconds % 60) end
  return ("%d s"):format(math.ceil(seconds))
end

---A function (done, total [, unit_rate]) that keeps one line of stderr up to date; nil when
---nobody watches.
function output.progress(args, what)
  local terminal = sys.isatty(2)
  if not (terminal or args.progress) then return nil end
  local start, last = sys.seconds(), -1
  return function(done, total)
    local now = sys.seconds()
    if done < total and now - last < (terminal and 0.2 or 2) then return end
    last = now
    local line = ("%s %3d %%"):format(what, total > 0 and done * 100 // total or 100)
    if done > 0 and done < total and now - start > 1 then
      line = line .. ", " .. left((now - start) * (total - done) / done) .. " left"
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
