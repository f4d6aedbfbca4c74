--- moonlet imatrix: what the inputs of a model's matrices look like over a text.
local output = require "moonlet.cli.output"
local outputs = require "moonlet.outputs"

local imatrix = {}

function imatrix.define(parser)
  local command = parser:command("imatrix", "Calibrate: write an imatrix, and Hessians.")
  output.dir_argument(command)
  command:option("--text", "text file to calibrate with"):argname("F")
    :convert(output.some_text("--text"))
  command:option("--chunk", "tokens per chunk of --text (default 512)"):argname("N")
    :convert(output.integer("--chunk", 2))
  command:option("--chunks", "only the first N chunks of --text"):argname("N")
    :convert(output.integer("--chunks", 1))
  command:option("--chat", "JSON Lines of {messages, tools, template}"):argname("DIALOGUES.jsonl")
    :convert(output.some_text("--chat"))
  command:option("--dialogues", "only dialogues A to B"):argname("A-B")
    :convert(output.range("--dialogues"))
  command:option("-o --out", "the imatrix to write, llama.cpp's GGUF form"):argname("OUT.gguf")
    :convert(output.some_text("-o"))
  command:option("--hessians", "the Hessians to write"):argname("OUT.safetensors")
    :convert(output.some_text("--hessians"))
  command:flag("--resume", "go on where a run that was cut off had stopped")
  output.threads_option(command)
  output.progress_option(command)
  command:flag("--json", "print one JSON object")
end

local function check(args)
  if not (args.text or args.chat) then output.misuse("give --text or --chat, or both") end
  if not (args.out or args.hessians) then output.misuse("give -o or --hessians, or both") end
  local clash = outputs.clash(args.out, args.hessians, "-o and --hessians")
  if clash then output.misuse(clash) end
  if (args.chunk or args.chunks) and not args.text then
    output.misuse("--chunk and --chunks belong to --text")
  end
  if args.dialogues and not args.chat then output.misuse("--dialogues belongs to --chat") end
end

local function report(result)
  output.line(("%d matrices, %s tokens in %d chunks"):format(result.matrices,
    output.count(result.tokens), result.chunks))
  if result.experts > 0 then
    output.line(("%s of %s experts met no token"):format(output.count(result.never_met),
      output.count(result.experts)))
  end
  if result.hessians then output.line(("%d Hessians"):format(result.hessians)) end
  for _, note in ipairs(result.notes or {}) do output.line("note: " .. note) end
end

function imatrix.run(args)
  check(args)
  local result, message, code = require("moonlet").imatrix {
    model = output.dir(args.dir), file = args.text, chunk = args.chunk, chunks = args.chunks,
    chat = args.chat, dialogues = args.dialogues, out = args.out, hessians = args.hessians,
    threads = args.threads, resume = args.resume,
    on_progress = output.progress(args, "calibrating", "tokens"),
  }
  if not result then return nil, message, code end
  if args.json then
    output.print_json(result)
  else
    report(result)
  end
  return true
end

return imatrix
