--- moonlet forward: one native forward pass, written as safetensors.
local output = require "moonlet.cli.output"
local outputs = require "moonlet.outputs"
local safetensors = require "moonlet.safetensors"

local forward = {}

function forward.define(parser)
  local command = parser:command("forward", "Run a forward pass and write its results.")
  output.dir_argument(command)
  command:option("--ids", "token ids, separated by commas"):argname("1,2,3"):count(1)
    :convert(output.some_text("--ids"))
  command:option("--out", "safetensors file to write"):argname("F"):count(1)
    :convert(output.some_text("--out"))
  command:option("--want", "of logits, hidden, router, mtp"):default("logits")
    :argname("NAME,NAME")
  output.precision_option(command, "exact")
  output.threads_option(command)
  command:flag("--json", "print one JSON object")
end

local WANTS <const> = { logits = true, hidden = true, router = true, mtp = true }

local function split(text)
  local words = {}
  for word in text:gmatch("[^,%s]+") do words[#words + 1] = word end
  return words
end

local function entry(name, dtype, tensor)
  return { name = name, dtype = dtype, shape = tensor:shape(), data = tensor:bytes() }
end

-- Layers of {ids, weights} as two tensors [L,n,k].
local function router_entries(router)
  local shape = router[1].ids:shape()
  local ids, weights = {}, {}
  for i, layer in ipairs(router) do
    ids[i], weights[i] = layer.ids:bytes(), layer.weights:bytes()
  end
  shape = { #router, shape[1], shape[2] }
  return { name = "router.ids", dtype = "I32", shape = shape, data = table.concat(ids) },
    { name = "router.weights", dtype = "F32", shape = shape, data = table.concat(weights) }
end

local function entries_of(out)
  local entries = {}
  for _, name in ipairs { "logits", "hidden", "final" } do
    if out[name] then entries[#entries + 1] = entry(name, "F32", out[name]) end
  end
  if out.router then
    entries[#entries + 1], entries[#entries + 2] = router_entries(out.router)
  end
  if out.mtp then
    entries[#entries + 1] = entry("mtp.next_ids", "I32", out.mtp.next_ids)
    entries[#entries + 1] = entry("mtp.hidden", "F32", out.mtp.hidden)
    entries[#entries + 1] = entry("mtp.logits", "F32", out.mtp.logits)
  end
  return entries
end

function forward.run(args)
  local ids, want = output.token_ids(args.ids), split(args.want)
  if #ids == 0 then output.misuse("--ids: names nothing") end
  if #want == 0 then output.misuse("--want: names nothing") end
  local named = {}
  for _, name in ipairs(want) do
    if named[name] then output.misuse(("--want: '%s' is named twice"):format(name)) end
    named[name] = true
    if not WANTS[name] then
      output.misuse(("--want: '%s' is none of logits, hidden, router, mtp"):format(name))
    end
  end
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  local ok, out
  ok, message, code = outputs.check(args.out, model.dir)
  if not ok then return nil, message, code end
  out, message, code = model:forward(ids, { want = want })
  if not out then return nil, message, code end
  local entries = entries_of(out)
  ok, message, code = safetensors.write(args.out, entries)
  if not ok then return nil, message, code end
  local tensors = {}
  for i, e in ipairs(entries) do tensors[i] = { name = e.name, shape = e.shape } end
  if args.json then
    output.print_json { out = args.out, tensors = tensors }
  else
    for _, t in ipairs(tensors) do
      output.line(("%-16s [%s]"):format(t.name, table.concat(t.shape, ", ")))
    end
  end
  return true
end

return forward
