--- moonlet eval ppl: how well a model predicts a text or dialogues.
local output = require "moonlet.cli.output"

local command_eval = {}

function command_eval.define(parser)
  local command = parser:command("eval", "Measure a model.")
  command:command_target("measure")
  local ppl = command:command("ppl", "Perplexity of a text or of dialogues.")
  output.dir_argument(ppl)
  ppl:option("--file", "text file, evaluated in windows"):argname("TEXT")
  ppl:option("--chat", "JSON Lines of {messages, tools, template}; only what assistants say "
    .. "is scored"):argname("DIALOGUES.jsonl")
  ppl:option("--window", "tokens per window of --file (default 512)"):argname("N")
    :convert(output.integer("--window", 2))
  output.precision_option(ppl, "exact")
  output.threads_option(ppl)
  output.progress_option(ppl)
  ppl:flag("--json", "print one JSON object")
end

function command_eval.run(args)
  if (args.file == nil) == (args.chat == nil) then
    output.misuse("give one of --file and --chat")
  end
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  local result
  result, message, code = require("moonlet.eval").perplexity(model, {
    file = args.file,
    chat = args.chat,
    window = args.window,
    on_progress = output.progress(args, "evaluating"),
  })
  if not result then return nil, message, code end
  if args.json then
    output.print_json(result)
  else
    local form = "perplexity %.6g over %s tokens (%.6g per word over %s words)"
    output.line(form:format(result.perplexity, output.count(result.tokens),
      result.word_perplexity, output.count(result.words)))
  end
  return true
end

return command_eval
