-- Speed of several engines on one machine, in turn: A B C, A B C, ...
--
--   eval "$(./quickstart env)"
--   lua5.4 bench/side_by_side.lua --threads 2 --depth 0,4096 --rounds 5 --out result.json \
--     'moonlet = moonlet DIR' \
--     'llama.cpp = llama-bench BIN/llama-bench MODEL.gguf -fa 0' \
--     'ik_llama.cpp = ik-llama-bench BIN/llama-bench MODEL.gguf -rtr 1'
--
-- Each engine is a name, how it is asked, its paths, and options of its own that are passed on.
-- They should have the same geometry, formats of about equal bits and the same threads; what a
-- token reads must not fit in the last-level cache. Memory's bandwidth is probed before and after
-- each round: a round in which it drifts by more than --drift says nothing and is thrown away. A
-- pass that is not counted comes first, so that everybody's files are in memory. Printed are
-- medians, extremes and the ratio to the first engine; --out keeps every round.
local argparse = require "argparse"
local bench = require "moonlet.bench"
local json = require "moonlet.json"
local output = require "moonlet.cli.output"
local sys = require "moonlet.sys"

local HOME <const> = arg[0]:match("^(.*)/[^/]*$") or "."

local function integers(text)
  local list = {}
  for word in text:gmatch("[^,]+") do
    local n = math.tointeger(tonumber(word))
    if not n or n < 0 then return nil, "option '--depth': tokens as 0,4096 expected" end
    list[#list + 1] = n
  end
  if #list == 0 then return nil, "option '--depth': must not be empty" end
  return list
end

local function share(text)
  local x = tonumber(text)
  if x and x >= 0 then return x end
  return nil, "option '--drift': a number from 0 expected"
end

local function parse_arguments()
  local parser = argparse("side_by_side", "Compares the speed of engines, round by round.")
  parser:argument("engines", "'NAME = moonlet DIR ...', 'NAME = llama-bench BINARY MODEL ...', "
    .. "'NAME = ik-llama-bench BINARY MODEL ...', 'NAME = ik-sweep-bench BINARY MODEL ...'")
    :args("+")
  local function count(name, min, what)
    return parser:option(name, what):convert(output.integer(name, min))
  end
  count("--threads", 1, "of every engine"):default("2")
  count("--prompt", 0, "tokens of a prompt"):default("512")
  count("--gen", 0, "tokens decoded"):default("64")
  parser:option("--depth", "tokens that precede"):convert(integers):default("0")
  count("--rounds", 1, "rounds that count"):default("5")
  count("--tries", 1, "rounds at most (three for each that counts)")
  parser:option("--drift", "of the bandwidth that a round may have"):convert(share)
    :default(tostring(bench.STEADY))
  parser:option("--out", "file for all rounds, JSON")
  local ok, args = parser:pparse()
  if not ok then output.misuse((args:gsub("%s*\n", "; "))) end
  return args
end

-- ---- engines ------------------------------------------------------------------------------------

local function quote(word)
  return "'" .. tostring(word):gsub("'", "'\\''") .. "'"
end

-- What a command prints and what it says besides, which is shown if it fails.
local function run(words)
  local quoted, log = {}, os.tmpname()
  for i, word in ipairs(words) do quoted[i] = quote(word) end
  local pipe <close> = assert(io.popen(table.concat(quoted, " ") .. " 2>" .. log))
  local text = pipe:read("a")
  local ok = pipe:close()
  local said = sys.read_file(log)
  os.remove(log)
  if not ok then error(("%s failed:\n%s"):format(table.concat(words, " "), said), 0) end
  return text, said
end

local function ask(words)
  return assert(json.decode((run(words))))
end

local function joined(list)
  return table.concat(list, ",")
end

-- Each takes an engine's words (paths, then options of its own) and a test { threads, prompt, gen,
-- depth }, and returns a list of { kind=, depth=, tokens_per_second= }.
local ASK <const> = {}

function ASK.moonlet(words, test)
  local command = { HOME .. "/../bin/moonlet", "bench", words[1], "--json", "--rounds", 1,
    "--threads", test.threads, "--prompt", test.prompt, "--gen", test.gen, "--depth",
    joined(test.depth) }
  return ask(table.move(words, 2, #words, #command + 1, command)).rows
end

-- What llama-bench measured, whose depths are in `depth_field`, or for decoding in n_prompt.
local function rows_of(results)
  local rows = {}
  for _, result in ipairs(results) do
    local decode = result.n_gen > 0
    rows[#rows + 1] = { kind = decode and "decode" or "prefill",
      depth = result.n_depth or decode and result.n_prompt or 0,
      tokens_per_second = result.avg_ts }
  end
  return rows
end

ASK["llama-bench"] = function(words, test)
  local command = { words[1], "-m", words[2], "-t", test.threads, "-p", test.prompt, "-n", test.gen,
    "-d", joined(test.depth), "-r", 1, "-o", "json" }
  return rows_of(ask(table.move(words, 3, #words, #command + 1, command)))
end

-- ik_llama.cpp's has no depths: a prompt is measured at 0 only, decoding after a prompt. Its
-- llama-sweep-bench, below, has both, but no medians.
ASK["ik-llama-bench"] = function(words, test)
  local command = { words[1], "-m", words[2], "-t", test.threads, "-r", 1, "-o", "json" }
  local at_zero = false
  for _, depth in ipairs(test.depth) do
    at_zero = at_zero or depth == 0
    if depth > 0 and test.gen > 0 then
      table.move({ "-gp", depth .. "," .. test.gen }, 1, 2, #command + 1, command)
    end
  end
  table.move({ "-p", at_zero and test.prompt or 0, "-n", at_zero and test.gen or 0 }, 1, 4,
    #command + 1, command)
  return rows_of(ask(table.move(words, 3, #words, #command + 1, command)))
end

-- A prompt and decoding at every multiple of the prompt's length, as lines of JSON in what it says.
ASK["ik-sweep-bench"] = function(words, test)
  local wanted = {}
  for _, depth in ipairs(test.depth) do wanted[depth] = true end
  local command = { words[1], "-m", words[2], "-t", test.threads, "-ub", test.prompt,
    "-n", test.gen, "-c", math.max(table.unpack(test.depth)) + test.prompt,
    "--output-format", "jsonl" }
  local _, said = run(table.move(words, 3, #words, #command + 1, command))
  local rows = {}
  for line in said:gmatch("{[^\n]*}") do
    local step = assert(json.decode(line))
    if wanted[step.n_kv] then
      rows[#rows + 1] = { kind = "prefill", depth = step.n_kv, tokens_per_second = step.speed_pp }
      rows[#rows + 1] = { kind = "decode", depth = step.n_kv, tokens_per_second = step.speed_tg }
    end
  end
  return rows
end

local function read_engine(text)
  local name, rest = text:match("^%s*(%S+)%s*=%s*(.+)$")
  local words = {}
  for word in (rest or ""):gmatch("%S+") do words[#words + 1] = word end
  local kind = table.remove(words, 1)
  local needed = kind == "moonlet" and 1 or 2
  if not (ASK[kind] and #words >= needed) then
    output.misuse("an engine is 'NAME = moonlet DIR', 'NAME = [ik-]llama-bench BINARY MODEL' or "
      .. "'NAME = ik-sweep-bench BINARY MODEL': " .. text)
  end
  return { name = name, ask = ASK[kind], words = words, text = rest }
end

-- ---- rounds -------------------------------------------------------------------------------------

local function run_round(engines, test)
  local round = { before = assert(bench.bandwidth(test.threads)), engines = {} }
  for _, engine in ipairs(engines) do
    round.engines[engine.name] = engine.ask(engine.words, test)
  end
  round.after = assert(bench.bandwidth(test.threads))
  round.drift = math.abs(round.after - round.before) * 2 / (round.after + round.before)
  return round
end

local function run_all(engines, args)
  local test = { threads = args.threads, prompt = args.prompt, gen = args.gen, depth = args.depth }
  local first = { threads = test.threads, prompt = test.prompt, gen = 1, depth = { 0 } }
  for _, engine in ipairs(engines) do engine.ask(engine.words, first) end
  local rounds, kept, tries = {}, 0, args.tries or 3 * args.rounds
  while kept < args.rounds and #rounds < tries do
    local round = run_round(engines, test)
    round.counts = round.drift <= args.drift
    kept = kept + (round.counts and 1 or 0)
    rounds[#rounds + 1] = round
    io.stderr:write(("round %d: memory reads at %.1f, then %.1f GB/s%s\n"):format(#rounds,
      round.before / 1e9, round.after / 1e9, round.counts and "" or ": thrown away"))
  end
  return rounds, kept
end

-- ---- what came out ------------------------------------------------------------------------------

-- Speeds of an engine in the rounds that count, rising.
local function speeds(rounds, name, kind, depth)
  local list = {}
  for _, round in ipairs(rounds) do
    for _, row in ipairs(round.counts and round.engines[name] or {}) do
      if row.kind == kind and row.depth == depth then list[#list + 1] = row.tokens_per_second end
    end
  end
  table.sort(list)
  return list
end

local function median(list)
  local n = #list
  return (list[(n + 1) // 2] + list[n // 2 + 1]) / 2
end

local function print_test(engines, rounds, kind, depth)
  print(("\n%-24s %10s %10s %10s  against %s"):format(("%s at depth %d"):format(kind, depth),
    "median", "slowest", "fastest", engines[1].name))
  local base
  for _, engine in ipairs(engines) do
    local list = speeds(rounds, engine.name, kind, depth)
    if #list == 0 then
      print(("%-24s %10s"):format(engine.name, "-"))
    else
      local middle = median(list)
      base = base or middle
      print(("%-24s %10.2f %10.2f %10.2f  %.2fx"):format(engine.name, middle, list[1], list[#list],
        middle / base))
    end
  end
end

local function main()
  local args, engines = parse_arguments(), {}
  for i, text in ipairs(args.engines) do engines[i] = read_engine(text) end
  local rounds, kept = run_all(engines, args)
  if args.out then
    local report = { machine = bench.machine(), threads = args.threads, prompt = args.prompt,
      gen = args.gen, drift = args.drift, rounds = rounds, engines = {} }
    for _, engine in ipairs(engines) do report.engines[engine.name] = engine.text end
    assert(sys.write_file(args.out, json.encode(report) .. "\n"))
  end
  if kept == 0 then error(("no round of %d was steady enough"):format(#rounds), 0) end
  local machine = bench.machine()
  print(("%s, %d processors; %d threads; rounds: %d counted, %d thrown away; tokens/s"):format(
    machine.cpu, machine.processors, args.threads, kept, #rounds - kept))
  for _, depth in ipairs(args.depth) do
    if args.prompt > 0 then print_test(engines, rounds, "prefill", depth) end
    if args.gen > 0 then print_test(engines, rounds, "decode", depth) end
  end
end

local ok, message = pcall(main)
if not ok then
  local misuse = type(message) == "table" and message.misuse
  io.stderr:write("side_by_side: ", misuse or tostring(message), "\n")
  os.exit(misuse and 2 or 1)
end
