-- Time and memory of writing one checkpoint.
--
--   eval "$(./quickstart env)"
--   lua5.4 bench/quantize.lua DIR OUT recipe=uniform mode=mxfp4 threads=2
--
-- Options are those of moonlet.quantize. The rate is that of the weights as BF16, whatever the
-- source holds. Memory is what the process allocated at its most, looked at after every tensor;
-- mapped files come and go. OUT stays, for you to look at and remove.
local core = require "moonlet.core"
local moonlet = require "moonlet"

local options = { source = arg[1], out = arg[2] }
for i = 3, #arg do
  local key, value = arg[i]:match("^([%w_]+)=(.*)$")
  if key then options[key] = math.tointeger(tonumber(value)) or value end
  if value == "true" then options[key] = true end
end
if not (options.out and options.recipe) then
  io.stderr:write("usage: lua5.4 bench/quantize.lua DIR OUT recipe=NAME [option=value ...]\n")
  os.exit(2)
end

local peak, bytes = 0, 0
function options.on_progress(done, _, _, stage)
  if not stage then bytes = done end
  peak = math.max(peak, moonlet.bench.memory().own)
end

local start, cpu = core.seconds(), os.clock()
local plan = assert(moonlet.quantize(options))
local seconds = core.seconds() - start
print(("%.1f s, %.1f s of processor time, %.0f MB/s, %.0f MB own; %.2f GB read, %.2f GB written")
  :format(seconds, os.clock() - cpu, bytes / seconds / 1e6, peak / 1e6, bytes / 1e9,
    plan.total_bytes / 1e9))
