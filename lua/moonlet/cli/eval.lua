--- moonlet eval: how well a model predicts a text or dialogues, and how far it is from another.
local output = require "moonlet.cli.output"
local outputs = require "moonlet.outputs"
local plan = require "moonlet.cli.plan"
local recipe = require "moonlet.recipe"
local sys = require "moonlet.sys"

local command_eval = {}

local function text_options(command)
  command:option("--file", "text file, evaluated in windows"):argname("TEXT")
    :convert(output.some_text("--file"))
  command:option("--window", "tokens per window of --file (default 512)"):argname("N")
    :convert(output.integer("--window", 2))
  command:option("--windows", "only windows A to B"):argname("A-B")
    :convert(output.range("--windows"))
  command:option("--protocol", "windows (default), or card: only the first --tokens of --file, "
    .. "as one sequence"):choices { "windows", "card" }
  command:option("--tokens", "tokens of --protocol card"):argname("N")
    :convert(output.integer("--tokens", 2))
  command:option("--chat", "JSON Lines of {messages, tools, template}; only what assistants say "
    .. "is scored"):argname("DIALOGUES.jsonl"):convert(output.some_text("--chat"))
  command:option("--dialogues", "only dialogues A to B"):argname("A-B")
    :convert(output.range("--dialogues"))
end

local function common_options(command)
  output.precision_option(command, "exact")
  output.threads_option(command)
  output.progress_option(command)
  command:flag("--json", "print one JSON object")
end

function command_eval.define(parser)
  local command = parser:command("eval", "Measure a model.")
  command:command_target("measure")
  local ppl = command:command("ppl", "Perplexity of a text or of dialogues.")
  output.dir_argument(ppl)
  text_options(ppl)
  common_options(ppl)

  local kld = command:command("kld", "How far a model's predictions are from a reference's.")
  output.dir_argument(kld)
  kld:option("--reference", "checkpoint to compare with"):argname("REFDIR")
    :convert(output.some_text("--reference"))
  kld:option("--reference-logits", "file of --save-logits to compare with; it knows its text")
    :argname("F"):convert(output.some_text("--reference-logits"))
  kld:option("--save-logits", "compare nothing: write what DIR predicts, for --reference-logits")
    :argname("F"):convert(output.some_text("--save-logits"))
  kld:flag("--per-tensor", "quantize DIR in memory, a part at a time, and compare it with itself")
  kld:option("--by", "parts of --per-tensor"):choices { "class", "layer", "tensor" }
  kld:option("--recipe", "decisions of --per-tensor; without it --mode, --bits and --group are one")
    :argname("NAME"):convert(output.some_text("--recipe"))
  plan.base_options(kld)
  kld:option("--fit", "how --per-tensor chooses scales, where decisions do not say")
    :choices(recipe.FITS)
  kld:option("--imatrix", "means of squared inputs for --fit imatrix and best"):argname("F")
    :convert(output.some_text("--imatrix"))
  text_options(kld)
  kld:option("--per-position", "write one line of comma-separated values for each position")
    :argname("F.csv"):convert(output.some_text("--per-position"))
  kld:option("--report", "write a page of tables and pictures"):argname("F.html")
    :convert(output.some_text("--report"))
  common_options(kld)

  local report = command:command("report", "One page about results of kld --json.")
  report:argument("results", "files of kld --json, also with --per-tensor"):args("+")
    :argname("RESULT.json")
  report:option("--out", "the page"):argname("F.html"):count(1)
    :convert(output.some_text("--out"))
  report:option("--title", "its heading"):argname("TEXT")
    :convert(output.some_text("--title"))
end

local function text_given(args)
  if args.file and args.chat then output.misuse("give one of --file and --chat") end
  if args.chat and (args.window or args.windows) then
    output.misuse("--window and --windows belong to --file")
  end
  if (args.protocol == "card") ~= (args.tokens ~= nil) then
    output.misuse("--protocol card and --tokens go together")
  end
  if args.tokens and (args.window or args.windows or args.chat) then
    output.misuse("--protocol card takes --file and --tokens, nothing else")
  end
  if args.dialogues and not args.chat then output.misuse("--dialogues belongs to --chat") end
  return args.file or args.chat
end

-- What both measures take, as options of moonlet.eval.
local function text_of(args, what)
  return { file = args.file, window = args.window, windows = args.windows, chat = args.chat,
    dialogues = args.dialogues, protocol = args.protocol, tokens = args.tokens,
    on_progress = output.progress(args, what, "tokens") }
end

local function print_notes(result)
  for _, note in ipairs(result.notes or {}) do output.line("note: " .. note) end
end

local function run_ppl(args)
  if not text_given(args) then output.misuse("give one of --file and --chat") end
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  local result
  result, message, code = require("moonlet.eval").perplexity(model, text_of(args, "evaluating"))
  if not result then return nil, message, code end
  if args.json then
    output.print_json(result)
  else
    local form = "perplexity %.6g over %s tokens (%.6g per word over %s words)"
    output.line(form:format(result.perplexity, output.count(result.tokens),
      result.word_perplexity, output.count(result.words)))
    print_notes(result)
  end
  return true
end

-- ---- kld ----------------------------------------------------------------------------------------

local COLUMNS <const> = { "sequence", "position", "token", "kld", "nll", "reference_nll", "top",
  "reference_top" }

local function write_positions(path, positions)
  local lines = { table.concat(COLUMNS, ",") .. "\n" }
  for i, row in ipairs(positions) do
    local cells = {}
    for k, name in ipairs(COLUMNS) do
      cells[k] = (math.type(row[name]) == "float" and "%.9g" or "%d"):format(row[name])
    end
    lines[i + 1] = table.concat(cells, ",") .. "\n"
  end
  return sys.write_file(path, table.concat(lines))
end

local function print_kld(result)
  local form = "KLD %.6g +- %.2g nats per token (median %.3g, 99 %% %.4g, 99.9 %% %.4g, "
    .. "largest %.4g)"
  output.line(form:format(result.mean, result.mean_error, result.median, result.p99, result.p999,
    result.max))
  output.line(("same best token %.3f %%"):format(100 * result.top1))
  output.line(("perplexity %.6g, of the reference %.6g, over %s tokens"):format(result.perplexity,
    result.reference_perplexity, output.count(result.tokens)))
end

local function save_logits(args)
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  local opts = text_of(args, "evaluating")
  opts.out = args.save_logits
  local result
  result, message, code = require("moonlet.eval").save_logits(model, opts)
  if not result then return nil, message, code end
  if args.json then
    output.print_json(result)
  else
    output.line(("%s: logits of %s positions"):format(args.save_logits,
      output.count(result.tokens)))
    print_notes(result)
  end
  return true
end

-- The page, if one is wanted, and then the numbers.
local function show(args, result, print_text)
  if args.report then
    local ok, message, code = require("moonlet.eval").report(result, args.report)
    if not ok then return nil, message, code end
  end
  if args.json then
    output.print_json(result)
  else
    print_text(result)
    print_notes(result)
  end
  return true
end

local function compare(args, reference)
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  local opts = text_of(args, "comparing")
  local result
  opts.reference, opts.reference_logits = reference, args.reference_logits
  opts.positions, opts.matrices = args.per_position ~= nil, args.json or args.report ~= nil
  result, message, code = require("moonlet.eval").kld(model, opts)
  if not result then return nil, message, code end
  if args.per_position then
    local ok
    ok, message, code = write_positions(args.per_position, result.positions)
    if not ok then return nil, message, code end
    result.positions = nil
  end
  return show(args, result, print_kld)
end

-- ---- per tensor ---------------------------------------------------------------------------------

local function print_table(result)
  local width = 5
  for _, row in ipairs(result.rows) do width = math.max(width, #row.name) end
  local form = "%-" .. width .. "s %8s %11s %10s %8s %10s %12s  %s"
  output.line(form:format(result.by, "tensors", "saved", "mean KLD", "+-", "99.9 %",
    "KLD per MiB", "decision"))
  local function line(row)
    output.line(form:format(row.name, output.count(row.tensors), output.bytes(row.saved),
      ("%.4g"):format(row.mean), ("%.1g"):format(row.mean_error), ("%.4g"):format(row.p999),
      row.kld_per_mib and ("%.4g"):format(row.kld_per_mib) or "", row.decision))
  end
  for _, row in ipairs(result.rows) do line(row) end
  for _, row in ipairs(result.totals) do line(row) end
end

local function decisions_of(args)
  if args.recipe then return nil, args.recipe, plan.options(args) end
  local mode = args.mode or (args.mxfp and "mxfp4") or "affine"
  return { { mode = mode, bits = args.bits or mode == "affine" and 4 or nil, group = args.group } }
end

local function per_tensor(args)
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  local opts = text_of(args, "comparing")
  opts.by, opts.fit, opts.imatrix = args.by, args.fit, args.imatrix
  opts.decisions, opts.recipe, opts.recipe_options = decisions_of(args)
  local result
  result, message, code = require("moonlet.eval").sensitivity(model, opts)
  if not result then return nil, message, code end
  return show(args, result, print_table)
end

-- ---- dispatch -----------------------------------------------------------------------------------

local function check_kld(args)
  local n = 0
  for _, name in ipairs { "reference", "reference_logits", "save_logits", "per_tensor" } do
    if args[name] then n = n + 1 end
  end
  if n ~= 1 then
    output.misuse("give one of --reference, --reference-logits, --save-logits and --per-tensor")
  end
  if not text_given(args) and not args.reference_logits then
    output.misuse("give one of --file and --chat")
  end
  if args.per_position and (args.save_logits or args.per_tensor) then
    output.misuse("--per-position needs a reference")
  end
  local clash = outputs.clash(args.report, args.per_position, "--report and --per-position")
  if clash then output.misuse(clash) end
  if args.report and args.save_logits then output.misuse("--report needs a reference") end
  for _, name in ipairs { "by", "recipe", "bits", "group", "mode", "mxfp", "fit", "imatrix" } do
    if args[name] and not args.per_tensor then
      output.misuse(("--%s belongs to --per-tensor"):format(name))
    end
  end
  if args.fit == "imatrix" and not args.imatrix then
    output.misuse("--fit imatrix needs --imatrix")
  end
  if #args.sets > 0 and not args.recipe then output.misuse("--set belongs to --recipe") end
end

local function run_kld(args)
  check_kld(args)
  for _, name in ipairs { "report", "per_position" } do
    if args[name] then
      local ok, message, code = outputs.check(args[name], output.dir(args.dir), args.reference,
        args.reference_logits, args.file, args.chat, args.imatrix)
      if not ok then return nil, message, code end
    end
  end
  if args.save_logits then return save_logits(args) end
  if args.per_tensor then return per_tensor(args) end
  if not args.reference then return compare(args) end
  local reference <close>, message, code = output.open_model { dir = args.reference,
    threads = args.threads, precision = "exact" }
  if not reference then return nil, message, code end
  return compare(args, reference)
end

-- ---- report -------------------------------------------------------------------------------------

local function run_report(args)
  for _, path in ipairs(args.results) do
    if path == "" then output.misuse("RESULT.json must not be empty") end
  end
  local ok, problem, kind = outputs.check(args.out, table.unpack(args.results))
  if not ok then return nil, problem, kind end
  local results = {}
  for i, path in ipairs(args.results) do
    local result, message, code = output.read_json(path)
    if result == nil then return nil, message, code end
    if not require("moonlet.eval.report").is_result(result) then
      return nil, path .. ": not what eval kld --json prints", "format"
    end
    results[i] = result
  end
  return require("moonlet.eval.report").report(results, args.out, { title = args.title })
end

function command_eval.run(args)
  if args.measure == "report" then return run_report(args) end
  if args.measure == "kld" then return run_kld(args) end
  return run_ppl(args)
end

return command_eval
