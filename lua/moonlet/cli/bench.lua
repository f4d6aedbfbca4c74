--- moonlet bench: how fast a checkpoint runs here.
local json = require "moonlet.json"
local output = require "moonlet.cli.output"
local sys = require "moonlet.sys"

local bench = {}

-- A converter for "0,4096,16384".
local function depths(text)
  local list, named = {}, {}
  for word in (text .. ","):gmatch("([^,]*),") do
    local n = word:find("^%d+$") and math.tointeger(tonumber(word))
    if not n then
      return nil, ("option '--depth': tokens as 0,4096 expected, got '%s'"):format(text)
    end
    if named[n] then return nil, ("option '--depth': %d is named twice"):format(n) end
    list[#list + 1], named[n] = n, true
  end
  return list
end

function bench.define(parser)
  local command = parser:command("bench", "Measure how fast a model runs.")
  output.dir_argument(command)
  command:option("--prompt", "tokens of a prompt; 0: no prompts"):argname("N")
    :convert(output.integer("--prompt", 0)):default("512")
  command:option("--gen", "tokens decoded one by one; 0: none"):argname("N")
    :convert(output.integer("--gen", 0)):default("128")
  command:option("--depth", "tokens that precede, such as 0,4096,16384")
    :argname("N,N"):convert(depths):default("0")
  command:option("--rounds", "measurements of each row"):argname("N")
    :convert(output.integer("--rounds", 1)):default("3")
  command:option("--probe", "memory that a probe of the bandwidth reads (default 1G)")
    :argname("SIZE"):convert(output.size("--probe", 1))
  command:option("--kv", "codec of the key/value cache"):choices { "f16", "f32" }
  output.precision_option(command, "fast")
  output.threads_option(command)
  command:flag("--profile", "also say what each operation takes")
  output.progress_option(command)
  command:flag("--json", "print one JSON object")
end

local function print_head(report)
  output.line(("%s, %d processors; %d threads, precision %s, %s cache"):format(report.machine.cpu,
    report.machine.processors, report.threads, report.precision, report.kv))
  output.line("kernels " .. output.kernels(report))
  output.line(("opened in %.2f s%s"):format(report.open_seconds, report.memory
    and ("; %s of memory beside %s of the checkpoint"):format(output.bytes(report.memory.own),
      output.bytes(report.memory.file)) or ""))
  local memory = report.memory
  if memory then
    output.line(("cache and state take %s; the other %s are %.1f %% over those and the checkpoint")
      :format(output.bytes(memory.cache), output.bytes(memory.own - memory.cache),
        memory.excess * 100))
  end
  output.line(("memory reads at %.1f GB/s"):format(report.bandwidth_bytes_per_second / 1e9))
end

local ROW <const> = "%-8s %7d %7d %9.3f %9.2f %9.2f %9.2f %9.1f %7.1f %8.0f %% %7s%s"

local function print_rows(report)
  output.line("")
  output.line("kind       depth  tokens   seconds  tokens/s   slowest   fastest  MB/token"
    .. "    GB/s  of memory   Gop/s")
  local unsteady = false
  for _, row in ipairs(report.rows) do
    local arithmetic, marked = row.arithmetic_per_second, row.unsteady_rounds > 0
    output.line(ROW:format(row.kind, row.depth, row.tokens, row.seconds, row.tokens_per_second,
      row.tokens / row.slowest_seconds, row.tokens / row.fastest_seconds,
      row.bytes_per_token / 1e6, row.bytes_per_token * row.tokens_per_second / 1e9,
      row.bandwidth_share * 100, arithmetic and ("%.1f"):format(arithmetic / 1e9) or "",
      marked and " *" or ""))
    unsteady = unsteady or marked
  end
  if report.beside then
    output.line(("sampling, detokenizing and Lua take %.3f ms more per token: %.1f %% of its time")
      :format(report.beside.seconds * 1e3, report.beside.share * 100))
  end
  if unsteady then
    output.line(("* memory's speed changed by more than %.0f %% during a round: something else "
      .. "runs here"):format(require("moonlet.bench").STEADY * 100))
  end
end

local function print_operations(row)
  output.line("")
  output.line(("%s at depth %d"):format(row.kind, row.depth))
  output.line("operation   ms/token  of time  MB/token     GB/s  of memory")
  for _, op in ipairs(row.operations) do
    output.line(("%-10s %9.4f %6.1f %% %9.2f %8.1f %7.0f %%"):format(op.op,
      op.seconds * 1e3 / row.tokens, op.time_share * 100, op.bytes / 1e6 / row.tokens,
      op.seconds > 0 and op.bytes / 1e9 / op.seconds or 0, op.bandwidth_share * 100))
  end
end

function bench.run(args)
  if args.prompt + args.gen == 0 then output.misuse("--prompt and --gen are both 0") end
  local start = sys.seconds()
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  local open_seconds = sys.seconds() - start
  local report
  report, message, code = require("moonlet.bench").run(model, { prompt = args.prompt,
    gen = args.gen, depths = args.depth, rounds = args.rounds, kv = args.kv,
    probe = args.probe, on_progress = output.progress(args, "measuring", "tokens") })
  if not report then return nil, message, code end
  report.open_seconds = open_seconds
  if args.json then
    output.print_json(json.object(report))
    return true
  end
  print_head(report)
  print_rows(report)
  for _, row in ipairs(args.profile and report.rows or {}) do print_operations(row) end
  return true
end

return bench
