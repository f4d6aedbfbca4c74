--- How fast a model is: prompts and single tokens at several depths, each beside the speed at which
--- memory could be read at that moment.
--
-- A machine that is shared changes its speed by the minute. So every measurement stands between two
-- probes of memory's bandwidth, rows are measured in turn, round by round, and of a row's rounds
-- the median one is reported as a whole, with its probes and its profile. Token ids are drawn: no
-- tokenizer is needed, and experts are chosen as variedly as text chooses them.
local core = require "moonlet.core"
local generate = require "moonlet.generate"
local options = require "moonlet.options"

local bench = {}

-- Probes that differ by more than this leave open what a speed is a share of.
bench.STEADY = 0.15

local OPTIONS <const> = { prompt = "integer", gen = "integer", depths = "table", rounds = "integer",
  kv = "string", probe = "integer", on_progress = "function" }

local function median(list)
  local sorted = table.move(list, 1, #list, 1, {})
  table.sort(sorted)
  return sorted[(#sorted + 1) // 2]
end

local PROBE_BYTES <const> = 1 << 30

-- Bytes that can be touched without others giving up what they hold (proc_meminfo(5)); nil where
-- the system does not tell.
local function available_memory()
  local file <close> = io.open("/proc/meminfo")
  local kib = file and file:read("a"):match("MemAvailable:%s*(%d+) kB")
  return kib and math.tointeger(kib) * 1024
end

-- A system that promises more memory than it has kills whoever touches it: a probe of that size is
-- refused before.
local function check_probe(bytes)
  local available = available_memory()
  if not available or bytes <= available then return true end
  return nil, ("probe of %.1f GiB: %.1f GiB of memory are available"):format(bytes / 2 ^ 30,
    available / 2 ^ 30), "memory"
end

---Bytes per second that so many threads read from memory now: the median of several passes.
---@param threads integer
---@param bytes? integer read in each pass (1 GiB): more than the last-level cache holds
---@return number? bytes_per_second, string? message, string? code
function bench.bandwidth(threads, bytes)
  bytes = bytes or PROBE_BYTES
  local fits, why, kind = check_probe(bytes)
  if not fits then return nil, why, kind end
  local passes, message, code = core.bandwidth(threads, { bytes = bytes })
  if not passes then
    return nil, ("probe of %.1f GiB: %s"):format(bytes / 2 ^ 30, message), code
  end
  return median(passes)
end

---Memory of this process in bytes: what it allocated, and the part of mapped files (a checkpoint)
---that it touched, which the system can drop again. Nil where the system does not tell.
---@return { own: integer, file: integer }?
function bench.memory()
  local file <close> = io.open("/proc/self/status")
  local status = file and file:read("a") or ""
  local own, mapped = status:match("RssAnon:%s*(%d+)"), status:match("RssFile:%s*(%d+)")
  return own and mapped and { own = math.tointeger(own) * 1024,
    file = math.tointeger(mapped) * 1024 } or nil
end

---What the measurements ran on.
---@return { cpu: string, processors: integer }
function bench.machine()
  local file <close> = io.open("/proc/cpuinfo")
  local text = file and file:read("a") or ""
  local _, processors = text:gsub("\nprocessor%s*:", "")
  return { cpu = text:match("model name%s*:%s*([^\n]*)") or "unknown", processors = processors + 1 }
end

-- ---- one measurement ----------------------------------------------------------------------------

-- Ids below n, the same in every run.
local function drawer(n)
  local state = 1
  return function()
    state = state * 6364136223846793005 + 1442695040888963407
    return (state >> 33) % n
  end
end

local function draw_ids(draw, n)
  local ids = {}
  for i = 1, n do ids[i] = draw() end
  return ids
end

-- Appends ids one by one, or as one prompt; nil, message, code on failure.
local function append(session, ids, one_by_one)
  if not one_by_one then return session.core:eval(ids) end
  for _, id in ipairs(ids) do
    local ok, message, code = session.core:eval { id }
    if not ok then return nil, message, code end
  end
  return true
end

-- { seconds=, profile= } of one row, begun from a snapshot. A token on its own goes ahead of a
-- decode row, so that a page shared with the snapshot is copied outside the measurement.
local function measure(run, row)
  local session, decode = run.session, row.kind == "decode"
  local ok, message, code = session:restore(run.snapshots[row.depth])
  if ok and decode then ok, message, code = append(session, { run.draw() }) end
  if not ok then return nil, message, code end
  local ids = draw_ids(run.draw, row.tokens)
  session:profile(true)
  local start = core.seconds()
  ok, message, code = append(session, ids, decode)
  if not ok then return nil, message, code end
  return { seconds = core.seconds() - start, profile = session:profile() }
end

-- What is measured beside the forward pass: a usual policy, always the same draws.
local POLICY <const> = { temperature = 0.6, top_k = 20, top_p = 0.95, seed = 1 }

-- Seconds per token that a generation takes outside of evaluation: sampling, detokenizing, Lua. The
-- median of its tokens, at the first depth.
local function measure_beside(run, depth, tokens)
  local session = run.session
  local ok, message, code = session:restore(run.snapshots[depth])
  if ok then ok, message, code = append(session, { run.draw() }) end
  if not ok then return nil, message, code end
  local evaluated, took = 0, {}
  local timed = setmetatable({ step = function(_, id)
    local start = core.seconds()
    local done, why, kind = session:step(id)
    evaluated = core.seconds() - start
    return done, why, kind
  end }, { __index = session })
  local given = { max_tokens = tokens, stop_ids = {} }
  for name, value in pairs(POLICY) do given[name] = value end
  local start = core.seconds()
  given.on_token = function()
    took[#took + 1] = core.seconds() - start - evaluated
    start, evaluated = core.seconds(), 0
  end
  ok, message, code = generate.collect(timed, given)
  if not ok then return nil, message, code end
  run.progress(tokens)
  return median(took)
end

-- ---- all of them --------------------------------------------------------------------------------

local function list_rows(opts)
  local rows = {}
  for _, depth in ipairs(opts.depths) do
    for _, kind in ipairs { "prefill", "decode" } do
      local tokens = kind == "prefill" and opts.prompt or opts.gen
      if tokens > 0 then
        rows[#rows + 1] = { kind = kind, depth = depth, tokens = tokens, rounds = {} }
      end
    end
  end
  return rows
end

-- Fills the session up to each depth, once, and keeps snapshots; they share what they hold.
local function fill(run, depths)
  local session, at = run.session, 0
  for _, depth in ipairs(depths) do
    while at < depth do
      local n = math.min(depth - at, 512)
      local ok, message, code = append(session, draw_ids(run.draw, n))
      if not ok then return nil, message, code end
      at = at + n
      run.progress(n)
    end
    local message, code
    run.snapshots[depth], message, code = session:snapshot()
    if not run.snapshots[depth] then return nil, message, code end
  end
  return true
end

local function bytes_of(profile)
  local sum = 0
  for _, op in ipairs(profile) do sum = sum + op.bytes end
  return sum
end

-- Measures every row once, each between two probes.
local function run_round(run, rows)
  local before, message, code = bench.bandwidth(run.threads, run.probe)
  if not before then return nil, message, code end
  for _, row in ipairs(rows) do
    local took, after
    took, message, code = measure(run, row)
    if not took then return nil, message, code end
    run.progress(row.tokens)
    after, message, code = bench.bandwidth(run.threads, run.probe)
    if not after then return nil, message, code end
    took.before, took.after = before, after
    row.rounds[#row.rounds + 1] = took
    run.probes[#run.probes + 1] = after
    before = after
  end
  return true
end

-- Operations (a multiplication and an addition are two) of a prompt's tokens: of the matrices
-- without embedding and head, of attention over the positions so far, of the delta rule (decay,
-- S k, the update, S q: 7 for each element of S).
local function arithmetic(model, info)
  local matrices, message, code = model:matrices()
  if not matrices then return nil, message, code end
  local c, fixed, per_position = info.config, 0, 0
  for _, matrix in ipairs(matrices) do
    local routed = matrix.class:find("^expert_")
    if matrix.class ~= "embed" and matrix.class ~= "lm_head" then
      fixed = fixed + 2 * matrix.parameters
        * (routed and c.num_experts_per_tok / c.num_experts or 1)
    end
  end
  for _, kind in ipairs(c.layer_types) do
    if kind == "full_attention" then
      per_position = per_position + 4 * c.num_attention_heads * c.head_dim
    else
      fixed = fixed + 7 * c.linear_num_value_heads * c.linear_value_head_dim
        * c.linear_key_head_dim
    end
  end
  return function(row)
    return row.tokens * (fixed + per_position * (row.depth + (row.tokens + 1) / 2))
  end
end

-- The profile of a measurement with shares of its time and of the memory's bandwidth.
local function operations(profile, seconds, bandwidth)
  local list = {}
  for i, op in ipairs(profile) do
    list[i] = { op = op.op, calls = op.calls, seconds = op.seconds, bytes = op.bytes,
      time_share = op.seconds / seconds,
      bandwidth_share = op.seconds > 0 and op.bytes / op.seconds / bandwidth or 0 }
  end
  return list
end

local function is_steady(round)
  return math.abs(round.after - round.before) <= bench.STEADY * (round.after + round.before) / 2
end

-- What a row's rounds come to.
local function sum_up(row, count)
  local rounds, unsteady = row.rounds, 0
  table.sort(rounds, function(a, b) return a.seconds < b.seconds end)
  for _, round in ipairs(rounds) do unsteady = unsteady + (is_steady(round) and 0 or 1) end
  local middle = rounds[(#rounds + 1) // 2]
  local bandwidth, bytes = (middle.before + middle.after) / 2, bytes_of(middle.profile)
  return {
    kind = row.kind,
    depth = row.depth,
    tokens = row.tokens,
    seconds = middle.seconds,
    fastest_seconds = rounds[1].seconds,
    slowest_seconds = rounds[#rounds].seconds,
    tokens_per_second = row.tokens / middle.seconds,
    bytes_per_token = bytes / row.tokens,
    bandwidth_bytes_per_second = bandwidth,
    bandwidth_share = bytes / middle.seconds / bandwidth,
    arithmetic_per_second = row.kind == "prefill" and count(row) / middle.seconds or nil,
    rounds = #rounds,
    unsteady_rounds = unsteady,
    operations = operations(middle.profile, middle.seconds, bandwidth),
  }
end

local function check(opts)
  opts = options.check(opts, OPTIONS)
  local checked = { prompt = opts.prompt or 512, gen = opts.gen or 128, rounds = opts.rounds or 3,
    depths = table.move(opts.depths or { 0 }, 1, #(opts.depths or { 0 }), 1, {}), kv = opts.kv,
    probe = opts.probe or PROBE_BYTES, on_progress = opts.on_progress or function() end }
  for _, name in ipairs { "prompt", "gen" } do
    if checked[name] < 0 then options.misuse(("option '%s': 0 or more expected"):format(name)) end
  end
  if checked.rounds < 1 then options.misuse("option 'rounds': 1 or more expected") end
  if checked.probe < 1 then options.misuse("option 'probe': bytes expected") end
  if checked.prompt + checked.gen == 0 then options.misuse("nothing to measure") end
  if #checked.depths == 0 then options.misuse("option 'depths': at least one expected") end
  for _, depth in ipairs(checked.depths) do
    if math.type(depth) ~= "integer" or depth < 0 then
      options.misuse("option 'depths': tokens expected, 0 or more")
    end
  end
  table.sort(checked.depths)
  return checked
end

local function run_all(run, opts, rows)
  local ok, message, code = fill(run, opts.depths)
  if not ok then return nil, message, code end
  -- The first pass reads from disk what memory does not hold yet.
  ok, message, code = measure(run, rows[1])
  if not ok then return nil, message, code end
  run.progress(rows[1].tokens)
  for _ = 1, opts.rounds do
    ok, message, code = run_round(run, rows)
    if not ok then return nil, message, code end
  end
  if opts.gen == 0 then return true end
  run.beside, message, code = measure_beside(run, opts.depths[1], opts.gen)
  if not run.beside then return nil, message, code end
  return true
end

-- Of the memory of this process, `cache` is what keys, values and states of the session take;
-- beside them and the checkpoint, whose matrices take `checkpoint` bytes, it should be little.
local function measure_memory(session, info)
  local memory, stats = bench.memory(), session:stats()
  if not memory then return nil end
  memory.cache, memory.checkpoint = stats.kv_bytes + stats.state_bytes, 0
  for _, bytes in pairs(info.bytes_by_mode) do memory.checkpoint = memory.checkpoint + bytes end
  memory.excess = (memory.own - memory.cache) / (memory.checkpoint + memory.cache)
  return memory
end

-- The share of a generated token's time that is not the forward pass.
local function beside(run, rows)
  if not run.beside then return nil end
  local decode
  for _, row in ipairs(rows) do decode = decode or row.kind == "decode" and row end
  local forward = decode.seconds / decode.tokens
  return { seconds = run.beside, share = run.beside / (run.beside + forward) }
end

---Measures a model. Takes memory for a context of the greatest depth, and that of its probes.
---@param model moonlet.Model
---@param opts? { prompt?: integer, gen?: integer, depths?: integer[], rounds?: integer,
---  kv?: string, probe?: integer, on_progress?: fun(done: integer, total: integer) } prompts of
---  512 tokens and 128 single tokens at depth 0, 3 rounds, probes of 1 GiB; 0 tokens leave a kind
---  out
---@return table? report machine, threads, precision, kv, memory, kernels and kernels_by and
---  kernels_times as Model:info has them,
---  beside = { seconds, share }: what sampling, detokenizing and Lua take of a generated token,
---  bandwidth_bytes_per_second (median of all probes), rows: list of { kind, depth, tokens,
---  seconds, fastest_seconds, slowest_seconds, tokens_per_second, bytes_per_token,
---  bandwidth_bytes_per_second, bandwidth_share, arithmetic_per_second (of prompts, without the
---  head), rounds, unsteady_rounds, operations: list of { op, calls, seconds, bytes, time_share,
---  bandwidth_share } }
---@return string? message, string? code
function bench.run(model, opts)
  opts = check(opts)
  local fits, problem, cause = check_probe(opts.probe)
  if not fits then return nil, problem, cause end
  local info, rows = model:info(), list_rows(opts)
  local total, done = opts.depths[#opts.depths] + rows[1].tokens, 0
  for _, row in ipairs(rows) do total = total + row.tokens * opts.rounds end
  total = total + opts.gen
  local count, message, code = arithmetic(model, info)
  if not count then return nil, message, code end
  local session <close>, why, kind = model:session {
    ctx = opts.depths[#opts.depths] + math.max(opts.prompt, opts.gen + 1), kv = opts.kv }
  if not session then return nil, why, kind end
  local run = { session = session, threads = info.threads, draw = drawer(info.config.vocab_size),
    probe = opts.probe, snapshots = {}, probes = {}, progress = function(n)
      done = done + n
      opts.on_progress(done, total)
    end }
  local ok
  ok, message, code = run_all(run, opts, rows)
  -- Memory is measured where the pages of the deepest row count as the session's.
  if ok then ok, message, code = session:restore(run.snapshots[opts.depths[#opts.depths]]) end
  for _, snapshot in pairs(run.snapshots) do snapshot:close() end
  if not ok then return nil, message, code end
  local memory = measure_memory(session, info)
  local report = { machine = bench.machine(), threads = info.threads, kernels = info.kernels,
    kernels_by = info.kernels_by, kernels_times = info.kernels_times,
    precision = info.precision, kv = session:stats().codec, memory = memory,
    bandwidth_bytes_per_second = median(run.probes), rows = {} }
  for i, row in ipairs(rows) do report.rows[i] = sum_up(row, count) end
  report.beside = beside(run, report.rows)
  return report
end

return bench
