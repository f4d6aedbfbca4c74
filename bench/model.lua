-- Time and memory of one checkpoint: opening, prefill, decode.
--
--   eval "$(./quickstart env)"
--   lua5.4 bench/model.lua DIR [threads [prompt_tokens [generated_tokens]]]
--
-- Token ids are drawn from a fixed generator, so a checkpoint needs no tokenizer. Memory is what
-- /proc/self/status says: "file" is the part of the mapped weights that was touched, which the
-- system can drop again; "own" is what the process allocated. Processor time
-- counts all threads; unlike the clock it hardly depends on what else the machine does.
local core = require "moonlet.core"
local moonlet = require "moonlet"

local dir, threads, n_prompt, n_decode = arg[1], tonumber(arg[2]), tonumber(arg[3] or 64),
  tonumber(arg[4] or 32)
if not dir then
  io.stderr:write("usage: lua5.4 bench/model.lua DIR [threads [prompt [generated]]]\n")
  os.exit(2)
end

local function memory()
  local file = assert(io.open("/proc/self/status"))
  local status = file:read("a")
  file:close()
  local function mb(key) return tonumber(status:match(key .. ":%s*(%d+)")) * 1024 / 1e6 end
  return ("%.0f MB own, %.0f MB file"):format(mb "RssAnon", mb "RssFile")
end

local function measure(what, n, run)
  local start, cpu = core.seconds(), os.clock()
  run()
  local seconds = core.seconds() - start
  cpu = os.clock() - cpu
  print(("%-8s %8.3f s, %8.3f s of processor time%s   %s"):format(what, seconds, cpu,
    n and ("  %7.2f tokens/s"):format(n / seconds) or (" "):rep(18), memory()))
end

local model
measure("open", nil, function()
  model = assert(moonlet.open(dir, { threads = threads and threads // 1 }))
end)
local vocab = model:info().config.vocab_size
local state = 1
local function draw()
  state = state * 6364136223846793005 + 1442695040888963407
  return (state >> 33) % vocab
end
local prompt = {}
for i = 1, n_prompt do prompt[i] = draw() end
local session = assert(model:session { ctx = n_prompt // 1 + n_decode // 1 })
measure("prefill", n_prompt, function() assert(session:sync(prompt)) end)
for pass = 1, 2 do -- the first touches weights that are not in memory yet
  local n = n_decode // 2
  measure("decode " .. pass, n, function()
    for _ = 1, n do assert(session:step(draw())) end
  end)
end
model:close()
