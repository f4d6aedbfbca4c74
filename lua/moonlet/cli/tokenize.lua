--- moonlet tokenize: text to ids and back.
local json = require "moonlet.json"
local output = require "moonlet.cli.output"
local sys = require "moonlet.sys"

local tokenize = {}

function tokenize.define(parser)
  local command = parser:command("tokenize", "Turn text into token ids, or ids into text.")
  command:argument("dir", "checkpoint directory or tokenizer.json (default: the demo model)")
    :args("?")
  command:argument("text", "the text, or with --decode the ids"):args("?")
  command:option("--file", "take the text from a file; - is standard input"):argname("F")
    :convert(output.some_text("--file"))
  command:flag("--decode", "ids (separated by commas or spaces) to text")
  command:flag("--no-special", "control strings are plain text; with --decode they are left out")
  command:flag("--json", "print one JSON object")
end

-- With a single positional argument it is DIR if such a place exists, else the text.
local function sort_arguments(args)
  if args.dir and not args.text and not args.file and not sys.exists(args.dir) then
    return nil, args.dir
  end
  return args.dir, args.text
end

function tokenize.run(args)
  local dir, text = sort_arguments(args)
  if args.file and text then output.misuse("give the text or --file, not both") end
  local tok <close>, message, code = require("moonlet").tokenizer(output.dir(dir))
  if not tok then return nil, message, code end
  if not text then
    text, message, code = output.read_file(args.file or "-")
    if not text then return nil, message, code end
  end
  local ids
  if args.decode then
    ids = output.token_ids(text)
    text, message, code = tok:decode(ids, { skip_special = args.no_special or false })
    if not text then return nil, message, code end
  else
    ids, message, code = tok:encode(text, { special = not args.no_special })
    if not ids then return nil, message, code end
  end
  if args.json then
    output.print_json(json.object { ids = json.array(ids), text = text })
  elseif args.decode then
    output.line(text)
  else
    output.line(table.concat(ids, " "))
  end
  return true
end

return tokenize
