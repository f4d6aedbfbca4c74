--- moonlet render: messages through the checkpoint's chat template.
local json = require "moonlet.json"
local output = require "moonlet.cli.output"

local render = {}

function render.define(parser)
  local command = parser:command("render", "Render messages with the checkpoint's chat template.")
  output.dir_argument(command)
  command:option("--messages", "JSON array of messages; - is standard input"):argname("F.json")
    :count(1):convert(output.some_text("--messages"))
  command:option("--tools", "JSON array of tools"):argname("F.json")
    :convert(output.some_text("--tools"))
  command:flag("--no-generation-prompt", "do not open the assistant's turn")
  command:option("--set", "give the template a variable; the value is JSON or else text; may be "
    .. "repeated")
    :argname("NAME=VALUE"):count("*"):target("sets")
  command:flag("--json", "print one JSON object")
end

-- What templates compare with true and false: any other value would be taken for one of them.
local FLAGS <const> = { enable_thinking = true, preserve_thinking = true }

---NAME=VALUE pairs into a table; values that parse as JSON are that, others are text.
function render.assignments(sets)
  local given, named = {}, {}
  for _, set in ipairs(sets) do
    local name, value = set:match("^([%a_][%w_]*)=(.*)$")
    if not name then output.misuse(("--set %s: NAME=VALUE expected"):format(set)) end
    if named[name] then output.misuse(("--set %s: given twice"):format(name)) end
    named[name] = true
    local decoded, message = json.decode(value)
    if message then decoded = value end
    given[name] = decoded
  end
  return given
end

---The same as variables of a chat template.
function render.variables(sets)
  local variables = render.assignments(sets)
  for name in pairs(FLAGS) do
    local value = variables[name]
    if value ~= nil and type(value) ~= "boolean" then
      output.misuse(("--set %s: true or false expected"):format(name))
    end
  end
  return variables
end

---A file that holds a JSON array of objects.
---@param path string
---@param what string what the objects are
---@return table[]? list, string? message, string? code
function render.read_list(path, what)
  local list, message, code = output.read_json(path)
  if list == nil then return nil, message, code end
  local fits = json.is_array(list)
  for _, item in ipairs(fits and list or {}) do fits = fits and json.is_object(item) end
  if fits then return list end
  return nil, ("%s: a JSON array of %s (objects) expected"):format(path, what), "format"
end

function render.run(args)
  local template, message, code = require("moonlet.template").open(output.dir(args.dir))
  if not template then return nil, message, code end
  local variables = render.variables(args.sets)
  local messages
  messages, message, code = render.read_list(args.messages, "messages")
  if not messages then return nil, message, code end
  if args.tools then
    variables.tools, message, code = render.read_list(args.tools, "tools")
    if not variables.tools then return nil, message, code end
  end
  variables.add_generation_prompt = not args.no_generation_prompt
  local text
  text, message, code = template:render(messages, variables)
  if not text then return nil, message, code end
  if args.json then
    output.print_json { text = text }
  else
    output.write(text)
  end
  return true
end

return render
