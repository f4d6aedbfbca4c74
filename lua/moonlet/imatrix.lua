-- imatrix: what the inputs of every matrix look like, read from and written to llama.cpp's files.
--
-- Files speak of a GGUF model; here everything has the names and the order of Hugging Face. An
-- imatrix that belongs to another model is refused when it is read, not when it is used.

local core = require "moonlet.core"
local layout = require "moonlet.layout"
local names = require "moonlet.gguf_names"
local options = require "moonlet.options"

local imatrix = {}

---@class moonlet.Imatrix
---@field path string        of the first file
---@field datasets string[]  names of the texts, as the files give them
---@field chunk_count integer
---@field chunk_size integer tokens per chunk; 0 if unknown
---@field notes string[]     lines that the user should read
---@field never_met integer  experts that no token reached, over all stacks
local Imatrix = {}
Imatrix.__index = Imatrix

-- ---- geometry ----------------------------------------------------------------------------------

-- Bare name -> { n_in, n_mat, layer } of every matrix of the text stack.
local function matrices(numbers)
  local list = {}
  for _, t in ipairs(assert(layout.tensors(numbers))) do
    if t.part == "text" and t.matrix then
      list[names.bare(t.name)] = { n_in = t.cols, n_mat = #t.shape == 3 and t.shape[1] or 1,
        layer = t.layer }
    end
  end
  return list
end

-- Only out_proj reads a vector whose heads GGUF files have in another order.
local function order_heads(numbers, name, bytes, to_file)
  if not name:find("%.linear_attn%.out_proj$") then return bytes end
  local keys = numbers.linear_num_key_heads
  return core.imatrix_order_heads(bytes, keys, numbers.linear_num_value_heads // keys,
    numbers.linear_value_head_dim, to_file)
end

-- ---- reading -----------------------------------------------------------------------------------

local function wrong_size(path, entry, name, shape, n_values, n_in)
  local theirs = n_in > 0 and ("%d x %d"):format(n_values // n_in, n_in) or tostring(n_values)
  return nil, ("%s: %s has %s numbers, %s of this model %d x %d"):format(path, entry, theirs, name,
    shape.n_mat, shape.n_in), "format"
end

-- Every entry of the file is either none that moonlet knows, or one of this model's. Returns the
-- set of layers that have entries.
local function check_entries(self, numbers)
  local layers, n, n_layers = {}, 0, numbers.num_hidden_layers
  for _, entry in ipairs(self.set:names()) do
    local name, layer = names.from_gguf(entry)
    local shape = self.matrices[name]
    local is_mtp = layer and layer >= n_layers and layer < n_layers + numbers.mtp_num_hidden_layers
    if shape then
      local fits, n_values, n_in = self.set:fits(entry, shape.n_in, shape.n_mat)
      if not fits then return wrong_size(self.path, entry, name, shape, n_values, n_in) end
      n = n + 1
      if layer then layers[layer] = true end
    elseif layer and layer >= n_layers and not is_mtp then
      return nil, ("%s: %s: this model has %d layers"):format(self.path, entry, n_layers), "format"
    elseif layer and name and not is_mtp then
      return nil, ("%s: %s: this model has no %s"):format(self.path, entry, name), "format"
    end
  end
  if n == 0 then
    return nil, self.path .. ": no entry is of a tensor of this model", "format"
  end
  for i = 0, n_layers - 1 do
    if not layers[i] then
      return nil, ("%s: no entry for layer %d (blk.%d) of %d"):format(self.path, i, i, n_layers),
        "format"
    end
  end
  return true
end

local function all_zero(list)
  for _, n in ipairs(list) do
    if n > 0 then return false end
  end
  return true
end

-- The entry that tells of a matrix' inputs, and how many tokens met each matrix; or nil.
local function find_entry(self, present, name, shape)
  local candidates = names.same_inputs(name)
  if name == "embed_tokens" then candidates = {} end -- a table that is looked up has no inputs
  if name == "lm_head" or (name == "embed_tokens" and self.numbers.tie_word_embeddings) then
    candidates = { "output.weight", "token_embd.weight" }
  end
  for _, entry in ipairs(candidates) do
    if present[entry] then
      local tokens = self.set:tokens(entry, shape.n_mat)
      if not all_zero(tokens) then return entry, tokens end
    end
  end
end

local function add_notes(self, missing, experts)
  if self.never_met > 0 then
    self.notes[#self.notes + 1] = ("%s: no token reached %d of %d expert matrices; they get the "
      .. "mean of their layer's others"):format(self.path, self.never_met, experts)
  end
  if missing[1] then
    table.sort(missing)
    self.notes[#self.notes + 1] = ("%s: nothing about the inputs of %s%s; all count the same there")
      :format(self.path, missing[1], #missing > 1 and (" and %d more"):format(#missing - 1) or "")
  end
end

-- Finds every matrix' entry once.
local function bind(self)
  local present, missing, experts = {}, {}, 0
  for _, entry in ipairs(self.set:names()) do present[entry] = true end
  for name, shape in pairs(self.matrices) do
    local tokens
    shape.entry, tokens = find_entry(self, present, name, shape)
    if not shape.entry and shape.layer then missing[#missing + 1] = name end
    if shape.entry and shape.n_mat > 1 then
      experts = experts + shape.n_mat
      for _, n in ipairs(tokens) do
        if n == 0 then self.never_met = self.never_met + 1 end
      end
    end
  end
  add_notes(self, missing, experts)
end

---Reads an imatrix for a model: llama.cpp's GGUF or .dat form, or several files added up.
---@param path string|string[]
---@param numbers table  of the text stack, as moonlet.core.model_config gives them
---@return moonlet.Imatrix? imatrix
---@return string? message  names the file, and the tensor with both sizes if one does not fit
---@return string? code
function imatrix.read(path, numbers)
  local paths = type(path) == "table" and path or { path }
  if type(paths[1]) ~= "string" then
    options.misuse("imatrix: path or list of paths expected, got " .. type(paths[1]))
  end
  local set, message, code = core.imatrix_open(paths)
  if not set then return nil, message, code end
  local self = setmetatable(set:info(), Imatrix)
  self.set, self.path, self.numbers, self.notes, self.never_met = set, paths[1], numbers, {}, 0
  self.matrices = matrices(numbers)
  local ok
  ok, message, code = check_entries(self, numbers)
  if not ok then
    set:close()
    return nil, message, code
  end
  bind(self)
  return self
end

local function find(self, name)
  local bare, expert = names.bare(name)
  local shape = self.matrices[bare]
  if not shape then options.misuse("imatrix: the model has no matrix " .. name) end
  return bare, shape, expert
end

---Mean squares of the inputs of a matrix, as little-endian f32; nil if the file says nothing about
---them. Of a stack of experts: those of one expert (its neighbours' mean if no token reached it),
---or of all tokens of all experts. They may be zero, never NaN.
---@param name string     of Hugging Face or MLX, with or without prefix, ".weight" and expert
---@param expert integer? from 0
---@return string? bytes
---@return number? tokens  that the mean is of; 0 if it is the neighbours'
function Imatrix:importance(name, expert)
  local bare, shape, named = find(self, name)
  if not shape.entry then return nil end
  expert = expert or named
  if shape.n_mat == 1 then expert = 0 end
  if expert and (expert < 0 or expert >= shape.n_mat) then
    options.misuse(("imatrix: %s has no expert %d"):format(name, expert))
  end
  local bytes, tokens = self.set:mean_squares(shape.entry, shape.n_mat, expert or -1)
  return order_heads(self.numbers, bare, bytes, false), tokens
end

---How many tokens each matrix of a stack met, or the one that a name is of; nil if the file says
---nothing about them.
---@param name string
---@return number[]?
function Imatrix:tokens(name)
  local _, shape = find(self, name)
  return shape.entry and self.set:tokens(shape.entry, shape.n_mat)
end

---Frees the files; also on `<close>`.
function Imatrix:close() self.set:close() end
Imatrix.__close = Imatrix.close

-- ---- writing -----------------------------------------------------------------------------------

---@class moonlet.imatrix.entry
---@field name string|string[]  matrices (or stacks) with these inputs, as in Imatrix:importance
---@field n_in integer
---@field n_mat integer     experts of a stack, 1 elsewhere
---@field sums2 string      [n_mat][n_in] f32: sums of x^2 over the tokens
---@field sums string?      sums of x
---@field counts string     [n_mat] f32: tokens

local WRITTEN = { numbers = "table", datasets = "table", chunk_count = "integer",
  chunk_size = "integer" }

---Writes an imatrix that llama.cpp, and imatrix.read, read: GGUF names and GGUF's order of heads.
---@param path string
---@param entries moonlet.imatrix.entry[]
---@param meta { numbers: table, datasets: string[]?, chunk_count: integer?, chunk_size: integer? }
---  numbers: the model's, as moonlet.core.model_config gives them
---@return boolean? ok
---@return string? message
---@return string? code
function imatrix.write(path, entries, meta)
  options.check(meta, WRITTEN)
  local list = {}
  for _, entry in ipairs(entries) do
    local given = type(entry.name) == "table" and entry.name or { entry.name }
    for _, name in ipairs(given) do
      local theirs = names.to_gguf(name)
      if not theirs then options.misuse("imatrix: no GGUF name for " .. name) end
      local bare = names.bare(name)
      list[#list + 1] = { name = theirs, n_in = entry.n_in, n_mat = entry.n_mat,
        counts = entry.counts, sums2 = order_heads(meta.numbers, bare, entry.sums2, true),
        sums = entry.sums and order_heads(meta.numbers, bare, entry.sums, true) }
    end
  end
  return core.imatrix_write(path, list, { datasets = meta.datasets or {},
    chunk_count = meta.chunk_count, chunk_size = meta.chunk_size })
end

---`moonlet.imatrix { model =, file =, out =, ... }` makes one: see moonlet.calibrate.
return setmetatable(imatrix, {
  __call = function(_, opts) return require("moonlet.calibrate").run(opts) end,
})
