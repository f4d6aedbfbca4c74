--- moonlet inspect: what a checkpoint is and how it is stored.
local output = require "moonlet.cli.output"

local inspect = {}

function inspect.define(parser)
  local command = parser:command("inspect", "Say what a checkpoint holds.")
  output.dir_argument(command)
  command:flag("--json", "print one JSON object")
end

local function row(name, value, ...)
  output.line(("  %-16s "):format(name) .. value:format(...))
end

local function print_shape(c)
  local full = 0
  for _, kind in ipairs(c.layer_types) do full = full + (kind == "full_attention" and 1 or 0) end
  row("layers", "%d: %d Gated DeltaNet, %d gated attention", #c.layer_types,
    #c.layer_types - full, full)
  row("hidden", "%d, vocabulary %s", c.hidden_size, output.count(c.vocab_size))
  row("attention", "%d query heads on %d of %d, %d dimensions rotate", c.num_attention_heads,
    c.num_key_value_heads, c.head_dim, c.rotary_dim)
  row("Gated DeltaNet", "%d key heads of %d, %d value heads of %d", c.linear_num_key_heads,
    c.linear_key_head_dim, c.linear_num_value_heads, c.linear_value_head_dim)
  if c.num_experts > 0 then
    row("experts", "%d of width %d, %d used, shared expert of width %d", c.num_experts,
      c.moe_intermediate_size, c.num_experts_per_tok, c.shared_expert_intermediate_size)
  else
    row("feed-forward", "dense, width %d", c.intermediate_size)
  end
  row("context", "%s tokens", output.count(c.max_position_embeddings))
end

local function print_info(info)
  local modes, total = {}, 0
  for mode, bytes in pairs(info.bytes_by_mode) do
    modes[#modes + 1] = mode .. " " .. output.bytes(bytes)
    total = total + bytes
  end
  table.sort(modes)
  row("architecture", "%s, %s layout", info.config.model_type, info.family)
  print_shape(info.config)
  row("parameters", "%s in the text stack%s%s", output.count(info.n_parameters),
    info.tied and ", embeddings tied" or "", info.mtp and ", and an MTP block" or "")
  row("stored", "%s, %.3f bits per weight: %s", output.bytes(total),
    total * 8 / info.n_parameters, table.concat(modes, ", "))
  row("tensors", "%d, of which %d are not part of the text model", info.n_tensors, info.n_ignored)
  row("tokenizer", "%s, chat template %s", info.tokenizer and "yes" or "no",
    info.chat_template and "yes" or "no")
  row("threads", "%d", info.threads)
  row("kernels", "%s", output.kernels(info))
end

function inspect.run(args)
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  local info
  info, message, code = model:info()
  if not info then return nil, message, code end
  if args.json then
    output.print_json(info)
    return true
  end
  output.line(model.dir)
  print_info(info)
  return true
end

return inspect
