--- A checkpoint: weights, tokenizer, chat template and generation defaults of one directory.
local core = require "moonlet.core"
local json = require "moonlet.json"
local layout = require "moonlet.layout"
local options = require "moonlet.options"
local Session = require "moonlet.session"
local sys = require "moonlet.sys"
local template = require "moonlet.template"
local tokenizer = require "moonlet.tokenizer"
local tune = require "moonlet.tune"

---@class moonlet.Model
---@field dir string
---@field precision "fast"|"exact"
---@field kernels table what tune.kernels chose
---@field tokenizer table? nil when the directory has no tokenizer.json
---@field template table? nil when the checkpoint has no chat template
---@field generation_config table? as in generation_config.json
---@field stop_ids integer[] ids that end a generation
local Model = {}
Model.__index = Model

-- The context that is reserved unless a session asks for another. Memory is only touched as it
-- fills, but attention scratch is reserved for all of it.
local DEFAULT_CTX <const> = 32768
local MAX_THREADS <const> = 1024 -- of base/pool.h

-- eos_token_id is an id or a list of ids, in generation_config.json or else in config.json.
local function find_stop_ids(generation_config, config)
  local text = json.is_object(config.text_config) and config.text_config or {}
  for _, place in ipairs { generation_config or {}, config, text } do
    local eos = place.eos_token_id
    if eos ~= nil and eos ~= json.null then
      local ids = json.is_array(eos) and eos or { eos }
      for _, id in ipairs(ids) do
        if math.type(id) ~= "integer" then
          return nil, "eos_token_id: a token id or a list of them expected", "format"
        end
      end
      return table.move(ids, 1, #ids, 1, {})
    end
  end
  return {}
end

local function load_parts(self)
  local config, message, code = json.read_object(self.dir .. "/config.json")
  if not config then return nil, message, code end
  local path = self.dir .. "/generation_config.json"
  if sys.exists(path) then
    self.generation_config, message, code = json.read_object(path)
    if not self.generation_config then return nil, message, code end
  end
  self.stop_ids, message, code = find_stop_ids(self.generation_config, config)
  if not self.stop_ids then return nil, self.dir .. ": " .. message, code end
  if sys.exists(self.dir .. "/tokenizer.json") then
    self.tokenizer, message, code = tokenizer.open(self.dir)
    if not self.tokenizer then return nil, message, code end
  end
  self.template, message, code = template.open(self.dir)
  if not self.template and code ~= "missing" then return nil, message, code end
  return true
end

---Opens a checkpoint directory without converting it.
---@param dir string holds config.json and safetensors; tokenizer and template are optional
---@param opts? { threads?: integer, precision?: "fast"|"exact" } all processors; "fast"
---@return moonlet.Model? model, string? message, string? code
function Model.open(dir, opts)
  if type(dir) ~= "string" then options.misuse("directory name expected, got " .. type(dir)) end
  opts = options.check(opts, { threads = "integer", precision = "string" })
  local precision = opts.precision or "fast"
  if precision ~= "fast" and precision ~= "exact" then
    options.misuse(("option 'precision': 'fast' or 'exact' expected, got '%s'"):format(precision))
  end
  if opts.threads and (opts.threads < 1 or opts.threads > MAX_THREADS) then
    options.misuse(("option 'threads': 1 to %d expected"):format(MAX_THREADS))
  end
  local self = setmetatable({ dir = dir, precision = precision, kernels = tune.kernels() }, Model)
  local ok, message, code
  self.core, message, code = core.model_open(dir,
    { threads = opts.threads, int8 = precision == "fast", kernels = self.kernels.kernels })
  if not self.core then return nil, message, code end
  ok, message, code = load_parts(self)
  if not ok then
    self:close()
    return nil, message, code
  end
  return self
end

---Opens what a checkpoint directory says about texts: encode, decode and render work as on a model,
---everything that needs weights raises.
---@param dir string
---@return moonlet.Model? model, string? message, string? code
function Model.open_texts(dir)
  if type(dir) ~= "string" then options.misuse("directory name expected, got " .. type(dir)) end
  local self = setmetatable({ dir = dir }, Model)
  local ok, message, code = load_parts(self)
  if not ok then
    self:close()
    return nil, message, code
  end
  return self
end

---A model for conversations, which take a tokenizer and a chat template.
---@param given string|moonlet.Model a directory to open, or a model
---@param opts? { threads?: integer, precision?: string }
---@param texts_only? boolean open_texts is enough
---@return moonlet.Model? model
---@return boolean|string is_opened whether it is the caller's to close; a message
---@return string? code
function Model.for_chat(given, opts, texts_only)
  local is_opened, self, message, code = type(given) ~= "table", given, nil, nil
  if is_opened and texts_only then
    self, message, code = Model.open_texts(given)
  elseif is_opened then
    self, message, code = Model.open(given, opts)
  end
  if not self then return nil, message, code end
  if self.tokenizer and self.template then return self, is_opened end
  if is_opened then self:close() end
  return nil, self.dir .. " has no tokenizer or no chat template", "unsupported"
end

---Frees the model. Sessions still open on it become unusable.
function Model:close()
  if self.core then self.core:close() end
  if self.tokenizer then self.tokenizer:close() end
end

Model.__close = Model.close

---What was found: architecture, dimensions, parameter counts, bytes by mode, formats.
---@return table info
function Model:info()
  local info = self.core:info()
  info.chat_template = self.template ~= nil
  info.tokenizer = self.tokenizer ~= nil
  info.precision = self.precision
  info.kernels_by, info.kernels_times = self.kernels.by, self.kernels.times
  return info
end

---Looks for weights that are NaN or infinite. Reads all of them: for explaining a result.
---@return true? ok, string? message names matrix, row and column, string? code "format"
function Model:check_finite()
  return self.core:check_finite()
end

local ENCODE_OPTIONS <const> = { special = "boolean", plain = "any", packed = "boolean" }
local DECODE_OPTIONS <const> = { skip_special = "boolean" }
local WANTS <const> = { logits = true, hidden = true, router = true, mtp = true }

local function no_tokenizer(self)
  return nil, self.dir .. ": no tokenizer.json", "missing"
end

local function check_ids(ids)
  if type(ids) ~= "table" then options.misuse("list of token ids expected, got " .. type(ids)) end
end

---@param text string
---@param opts? moonlet.EncodeOptions
---@return integer[]? ids 0-based model ids
---@return string? message, string? code "missing" without tokenizer
function Model:encode(text, opts)
  if not self.tokenizer then return no_tokenizer(self) end
  if type(text) ~= "string" then options.misuse("text expected, got " .. type(text)) end
  return self.tokenizer:encode(text, options.check(opts, ENCODE_OPTIONS))
end

---@param ids integer[]
---@param opts? { skip_special?: boolean }
---@return string? text, string? message, string? code "missing" without tokenizer
function Model:decode(ids, opts)
  if not self.tokenizer then return no_tokenizer(self) end
  check_ids(ids)
  return self.tokenizer:decode(ids, options.check(opts, DECODE_OPTIONS))
end

---The checkpoint's own chat template.
---@param messages table[] {role=, content=, ...}
---@param opts? table tools, add_generation_prompt, and whatever else the template reads
---@return string? text, string? message, string? code "missing" without template
function Model:render(messages, opts)
  if not self.template then return nil, self.dir .. ": no chat template", "missing" end
  return self.template:render(messages, opts)
end

---Native forward pass over a fresh sequence.
---@param ids integer[]
---@param opts? { want?: string[] } of "logits" (default), "hidden", "router", "mtp"
---@return table? out logits [n,V]; hidden [L+1,n,H] and final [n,H]; router[layer] = {ids, weights}
---  [n,k]; mtp = {next_ids [n], hidden [n,H], logits [n,V]}
function Model:forward(ids, opts)
  opts = options.check(opts, { want = "table" })
  check_ids(ids)
  for _, name in ipairs(opts.want or {}) do
    if not WANTS[name] then
      options.misuse(("option 'want': '%s' is none of logits, hidden, router, mtp"):format(name))
    end
  end
  return self.core:forward(ids, opts.want or { "logits" })
end

---Descriptions of the text stack's tensors, as recipes get them, matrices with the name that
---replace() takes in `module`.
---@return moonlet.Tensor[]? tensors, string? message, string? code
function Model:tensors()
  local config, message, code = json.read_object(self.dir .. "/config.json")
  if not config then return nil, message, code end
  local info = self.core:info()
  local tensors = layout.tensors(setmetatable({ tie_word_embeddings = info.tied,
    wrapped = json.is_object(config.text_config), mtp_num_hidden_layers = 0 },
    { __index = info.config }))
  for _, tensor in ipairs(tensors) do
    tensor.module = tensor.matrix and tensor.name:gsub("^model%.", "")
      :gsub("^language_model%.", ""):gsub("%.weight$", "") or nil
  end
  return tensors
end

---How the checkpoint holds each matrix of the text stack, expert stacks as one.
---@return { name: string, class: string, layer: integer?, parameters: integer, bytes: integer,
---  bits: number }[]? matrices bits per weight, scales and biases included
---@return string? message, string? code
function Model:matrices()
  local layout_of, message, code = core.model_layout(self.dir)
  if not layout_of then return nil, message, code end
  local bytes = {}
  for _, module in ipairs(layout_of.modules) do
    local name = module.name:gsub("%.experts%.%d+%.", ".experts.")
    bytes[name] = (bytes[name] or 0) + module.bytes
  end
  local tensors
  tensors, message, code = self:tensors()
  if not tensors then return nil, message, code end
  local list = {}
  for _, tensor in ipairs(tensors) do
    local n, size = tensor.rows * tensor.cols, bytes[tensor.module]
    if size then
      list[#list + 1] = { name = tensor.module, class = tensor.class, layer = tensor.layer,
        parameters = n, bytes = size, bits = size * 8 / n }
    end
  end
  return list
end

-- A replacement says one of these.
local PARTS <const> = { weight = "string", scales = "string", biases = "string", rows = "integer",
  cols = "integer", mode = "string", bits = "integer", group = "integer", dtype = "string" }
local ENCODING <const> = { mode = "string", bits = "integer", group = "integer", keep = "string",
  flavour = "string", mx_rule = "string", global_scale = "number", fit = "string",
  importance = "string" }

---Runs with one matrix replaced by an encoded copy of it, until restore(). Several may be replaced
---at once. The checkpoint is not touched, and info() describes that.
---@param name string below the text stack, without ".weight": "layers.3.mlp.experts.gate_proj" for
---  a whole expert stack, "layers.3.mlp.experts.7.gate_proj" for one expert, "lm_head"
---@param with table a decision {mode=, bits=, group=, fit=, importance=}, by which the
---  checkpoint's weights are encoded as moonlet.quantize does it (fit "imatrix" needs importance:
---  f32 mean squares of the inputs, of all matrices of a stack or of each), or {keep=} for the
---  checkpoint's own; or the bytes of one matrix: {weight=, scales=, biases=, rows=, cols=, mode=,
---  bits=, group=, dtype= of the scales}
---@return integer? bytes of what runs now, 0 for {keep=}
---@return string? message, string? code
function Model:replace(name, with)
  if type(name) ~= "string" then options.misuse("name of a matrix expected, got " .. type(name)) end
  if type(with) == "table" and with.weight then
    options.check(with, PARTS)
    local ok, message, code = self.core:replace(name, { codes = with.weight, scales = with.scales,
      biases = with.biases, rows = with.rows, cols = with.cols, mode = with.mode,
      bits = with.bits, group = with.group, scale_dtype = with.dtype, bias_dtype = with.dtype })
    if not ok then return nil, message, code end
    return #with.weight + #(with.scales or "") + #(with.biases or "")
  end
  options.check(with, ENCODING)
  if not with.keep then return self.core:encode(name, with) end
  local ok, message, code = self.core:restore(name)
  if not ok then return nil, message, code end
  return 0
end

---Runs the checkpoint's weights again.
---@param name? string of one matrix or stack; all without it
---@return true? ok, string? message, string? code
function Model:restore(name)
  return self.core:restore(name)
end

---A pass that takes all sequences through one layer before the next one: for models larger than
---memory. Every step() is one sequence through one layer and answers steps done and in all; after
---the last one score(i, targets) and final(i, targets) give of sequence i what a session's would.
---@param list integer[][] token ids of each sequence
---@param opts? { kv?: string, scratch?: string } cache codec as of session(); scratch: a directory
---  for the rows of all tokens (4 bytes times hidden size each), which are in memory otherwise
---@return table? layers step(), score(i, targets), final(i, targets), rows(), close()
---@return string? message, string? code
function Model:layers(list, opts)
  opts = options.check(opts, { kv = "string", scratch = "string" })
  check_ids(list)
  for _, ids in ipairs(list) do check_ids(ids) end
  return self.core:layers(list, {
    kv = opts.kv or (self.precision == "exact" and "f32" or "f16"),
    scratch = opts.scratch,
  })
end

---Compares predictions with those of a reference, over the whole vocabulary.
---@param final table rows of this model, from Session:final
---@param reference moonlet.Model|moonlet.ReferenceFile self stands for itself without replacements
---@param at table|integer the reference's rows, or the number of the first one in its file
---@param targets integer[] the token that follows, one for each row
---@return table? out tensors [k]: kl (KL(reference || model), nats), nll and reference_nll of the
---  targets, top and reference_top (best tokens)
---@return string? message, string? code
function Model:compare(final, reference, at, targets)
  check_ids(targets)
  local handle = getmetatable(reference) == Model and reference.core or reference
  local kl, p, q, top_p, top_q = core.kld_compare(self.core, final, handle, at, targets)
  if not kl then return nil, p, q end
  return { kl = kl, reference_nll = p, nll = q, reference_top = top_p, top = top_q }
end

local function raw_parts(parts)
  if type(parts) ~= "table" then options.misuse("list of parts expected, got " .. type(parts)) end
  local raw = {}
  for i, part in ipairs(parts) do
    local session = type(part) == "table" and part.session
    if getmetatable(session) ~= Session then
      options.misuse(("part %d: {session =, ids =} expected"):format(i))
    end
    check_ids(part.ids)
    raw[i] = { session = session.core, ids = part.ids, score = part.score }
  end
  return raw
end

---What the model makes of a text, filled in while a session takes it in: give it to eval() or
---start() with every piece, from the first. Log-probabilities of the tokens, or with `mean` what
---the last norm puts out, averaged.
---@param ids integer[] all of the text
---@param opts? { top?: integer, mean?: boolean } how many of the likeliest tokens to list (0)
---@return userdata score at(i) -> log-probability of token i >= 2, ids and log-probabilities of the
---  likeliest in its place; mean() -> number[]
function Model:scoring(ids, opts)
  check_ids(ids)
  return self.core:scoring(ids, options.check(opts, { top = "integer", mean = "boolean" }))
end

---Appends tokens to several sessions in one pass, which reads each weight once: the decode steps of
---many sequences cost little more than one. Each session ends up as its own evaluation would have
---left it, to the bit; on failure, or when cancelled, all are as they were.
---@param parts { session: moonlet.Session, ids: integer[], score: userdata? }[] at most 512 tokens
---  together; `score` as scoring() makes it
---@return boolean? ok, string? message, string? code
function Model:eval(parts)
  return self.core:eval_parts(raw_parts(parts))
end

---Begins the same in the background. Until the job's end has been seen, every other use of the
---model and its sessions raises.
---@param parts { session: moonlet.Session, ids: integer[], score: userdata? }[]
---@return userdata? job fd() can be read when it is done; is_done(); result() -> as eval();
---  cancel(); close()
---@return string? message, string? code
function Model:start(parts)
  return self.core:start_parts(raw_parts(parts))
end

---@return integer bytes of keys and values that sessions and snapshots hold, shared ones once
---@return integer kept of them, what only snapshots hold
function Model:kv_bytes()
  return self.core:kv_bytes()
end

---@param opts? { ctx?: integer, kv?: string } tokens of room (32768 or what the model takes) and
---  cache codec ("f16"; "f32" under precision "exact")
---@return moonlet.Session? session, string? message, string? code
function Model:session(opts)
  opts = options.check(opts, { ctx = "integer", kv = "string" })
  local limit = self.core:info().config.max_position_embeddings
  return Session.open(self, {
    ctx = opts.ctx or math.min(DEFAULT_CTX, limit),
    kv = opts.kv or (self.precision == "exact" and "f32" or "f16"),
  })
end

return Model
