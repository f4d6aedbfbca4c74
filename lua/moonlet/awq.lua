-- awq: what each matrix' columns are scaled by before they are rounded, so that large inputs suffer
-- least (AWQ, arXiv:2306.00978).
--
-- A group is a set of matrices that read one vector, and what that vector comes from: a norm
-- weight, or the rows of a matrix that is linear in them. The columns are multiplied by s, the
-- source divided by s. Here is which groups there are, which scales are tried and how they are
-- judged; nothing is written. Scales end up in the parts of tensor descriptions (moonlet.source),
-- from where every form of checkpoint takes them.

local core = require "moonlet.core"
local names = require "moonlet.gguf_names"

local awq = {}

-- Strengths that are tried: s = rms ^ alpha, 0 for none.
awq.GRID = { 0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75 }

-- Factors of all columns that are tried where scales of groups are E4M3 and nothing lies above
-- them: MLX writes nvfp4 without a scale of the matrix, and small weights fall below the range in
-- which E4M3 has three bits.
awq.GAINS = { 1, 4, 16, 64, 256 }

-- Weights of one matrix (or stack) that judge a strength; larger ones are sampled, rows evenly
-- spaced.
awq.SAMPLE = 1 << 22

-- Errors of a column are weighted by its inputs' mean square to this power. Columns that are loud
-- on average are not loud for the tokens that are hard: with 1 in its place, weighted errors fall
-- further and models get worse.
awq.TEMPER = 0.5

-- Mean squares below this share of the mean over all inputs count as that: how loud a quiet input
-- is elsewhere is not known well enough.
local QUIET = 1e-4

-- ---- groups ------------------------------------------------------------------------------------

---@class moonlet.awq.Group
---@field name string       what is divided
---@field norm moonlet.awq.Member?   a norm weight
---@field rows moonlet.awq.Member?   or the matrix whose rows are divided
---@field readers moonlet.awq.Member[]
---@field span integer[]    { outer, repeat, inner } of the readers' columns; repeats share a scale
---@field experts integer?  each has scales of its own, its part of all members
---@field gain_only boolean?  a search leaves its strength at 0

---@class moonlet.awq.Member
---@field name string       bare, as moonlet.gguf_names has it
---@field tensor moonlet.Tensor
---@field decision table

-- Groups of a layer as { divided, span, readers... }, names below the layer.
local function mixer_groups(c, kind)
  local H, all = c.hidden_size, 1
  if kind == "full_attention" then
    local per_kv = c.num_attention_heads // c.num_key_value_heads
    return {
      { "input_layernorm", { all, 1, H }, "self_attn.q_proj", "self_attn.k_proj",
        "self_attn.v_proj" },
      -- Attention is linear in the values; the output gate multiplies what comes out of it.
      { "self_attn.v_proj", { c.num_key_value_heads, per_kv, c.head_dim }, "self_attn.o_proj" },
    }
  end
  return {
    { "input_layernorm", { all, 1, H }, "linear_attn.in_proj_qkv", "linear_attn.in_proj_z",
      "linear_attn.in_proj_a", "linear_attn.in_proj_b" },
    -- The gated norm normalizes, multiplies by its weight, which all heads share, then by the gate.
    -- Means over heads that differ promise what does not come: of all groups this one alone made
    -- models worse, so its strength is not searched.
    { "linear_attn.norm", { all, c.linear_num_value_heads, c.linear_value_head_dim },
      "linear_attn.out_proj", gain_only = true },
  }
end

local function ffn_groups(c)
  local H = c.hidden_size
  -- silu(gate) * up is linear in up.
  if c.num_experts == 0 then
    return {
      { "post_attention_layernorm", { 1, 1, H }, "mlp.gate_proj", "mlp.up_proj" },
      { "mlp.up_proj", { 1, 1, c.intermediate_size }, "mlp.down_proj" },
    }
  end
  return {
    { "post_attention_layernorm", { 1, 1, H }, "mlp.gate", "mlp.shared_expert_gate",
      "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.experts.gate_proj",
      "mlp.experts.up_proj" },
    { "mlp.shared_expert.up_proj", { 1, 1, c.shared_expert_intermediate_size },
      "mlp.shared_expert.down_proj" },
    { "mlp.experts.up_proj", { 1, 1, c.moe_intermediate_size }, "mlp.experts.down_proj",
      experts = c.num_experts },
  }
end

local function members_of(decided)
  local members = {}
  for _, d in ipairs(decided) do
    if d.tensor.part == "text" then
      local name = names.bare(d.tensor.name)
      members[name] = { name = name, tensor = d.tensor, decision = d.decision }
    end
  end
  return members
end

-- Its columns are rounded to a format. (What is stored packed and stays so is not rounded again.)
local function is_quantized(member)
  return member.decision.mode ~= nil and not member.decision.exact
end

-- It can be written with scales: what is copied bit for bit cannot.
local function is_open(form, member)
  local d = member.decision
  if not member.tensor.matrix then return form.norm(member.tensor, d) ~= nil end
  return d.keep == "bf16" or is_quantized(member)
end

local function any_quantized(readers)
  for _, member in ipairs(readers) do
    if is_quantized(member) then return true end
  end
  return false
end

local function all_open(form, readers, source)
  for _, member in ipairs(readers) do
    if not is_open(form, member) then return false end
  end
  return is_open(form, source)
end

local function add_group(list, form, members, prefix, spec)
  local group = { name = prefix .. spec[1], span = spec[2], experts = spec.experts,
    gain_only = spec.gain_only, readers = {} }
  local source = members[group.name]
  for i = 3, #spec do group.readers[i - 2] = members[prefix .. spec[i]] end
  if not any_quantized(group.readers) or not all_open(form, group.readers, source) then return end
  group[source.tensor.matrix and "rows" or "norm"] = source
  list[#list + 1] = group
end

-- Every group that has a quantized reader and can be scaled. The last norm is left alone: the MTP
-- block, which is carried along as it is, reads what comes out of it.
local function all_groups(c, form, members)
  local list = {}
  for i, kind in ipairs(c.layer_types) do
    local prefix = ("layers.%d."):format(i - 1)
    for _, specs in ipairs { mixer_groups(c, kind), ffn_groups(c) } do
      for _, spec in ipairs(specs) do add_group(list, form, members, prefix, spec) end
    end
  end
  return list
end

-- What mlx-node does: one strength, and only these groups (convert.rs, apply_awq_prescaling and
-- compute_normalized_scales).
local MLX_NODE = { alpha = 1, gain = 1, share = 0, least = 1e-8 }

function MLX_NODE.has(group)
  local path = group.name:gsub("^layers%.%d+%.", "")
  return not group.experts and (path == "input_layernorm" or path == "mlp.up_proj"
    or path == "post_attention_layernorm" and group.readers[1].name:find("%.mlp%.gate_proj$"))
end

-- ---- scales ------------------------------------------------------------------------------------

---@class moonlet.awq.Search
---@field imatrix moonlet.Imatrix
---@field writer table     of moonlet.core, open on the source
---@field form table       see moonlet.shards
---@field zero_centred boolean  norms of the source are stored as w - 1
---@field flavour string?
---@field mx_rule string?
---@field fit_of fun(d: table): string?  how scales of groups will be chosen
---@field values table<string, string>    of norm weights, as they multiply
---@field shares table<string, number[]>  see shares_of
local Search = {}
Search.__index = Search

-- Everything about scales is a list: one for the group, or one for each of its experts.
local function units(group) return group.experts or 1 end

local function set_scale(group, member, unit, key, value)
  if group.experts then
    member.tensor.parts[unit][key] = value
  else
    for _, part in ipairs(member.tensor.parts) do part[key] = value end
  end
end

function Search:norm_values(norm)
  local tensor = norm.tensor
  if not self.values[norm.name] then
    local plain = {}
    for k, v in pairs(tensor.parts[1]) do plain[k] = k ~= "col_scale" and v or nil end
    local values, message, code = self.writer:values { op = "f32", parts = { plain },
      part_rows = tensor.part_rows, cols = tensor.cols,
      add = self.zero_centred and tensor.zero_centred and 1 or nil }
    if not values then return nil, message, code end
    self.values[norm.name] = values
  end
  return self.values[norm.name]
end

-- Gives the members of one unit the scales s, or takes theirs away.
function Search:apply(group, unit, s)
  local outer, times, inner = table.unpack(group.span)
  local columns = s
  if group.norm then
    local norm_scale
    if s then
      local values, message, code = self:norm_values(group.norm)
      if not values then return nil, message, code end
      norm_scale, columns = core.awq_fold_norm(values, s,
        self.form.norm(group.norm.tensor, group.norm.decision))
    end
    set_scale(group, group.norm, unit, "col_scale", norm_scale)
  else
    set_scale(group, group.rows, unit, "row_scale", s and core.awq_reciprocal(s))
  end
  columns = columns and core.awq_spread(columns, outer, times, inner)
  for _, reader in ipairs(group.readers) do
    set_scale(group, reader, unit, "col_scale", columns)
  end
  return true
end

-- ---- judging -----------------------------------------------------------------------------------

-- Of a stack: the share of its tokens that each expert sees, which is what its error counts.
function Search:shares_of(member)
  local shares = self.shares[member.name]
  if not shares then
    local sum = 0
    shares = self.imatrix:tokens(member.name) or {}
    for e = 1, #member.tensor.parts do sum = sum + (shares[e] or 1) end
    for e = 1, #member.tensor.parts do shares[e] = (shares[e] or 1) / sum end
    self.shares[member.name] = shares
  end
  return shares
end

-- The put that would write a member, with what its columns meet.
function Search:put_of(group, member)
  local tensor, d = member.tensor, member.decision
  local is_stack = #tensor.shape == 3
  local put = { op = "encode", parts = {}, part_rows = tensor.part_rows, cols = tensor.cols,
    mode = d.mode, bits = d.bits, group = d.group, fit = self.fit_of(member),
    flavour = self.flavour, mx_rule = self.mx_rule }
  for i, part in ipairs(tensor.parts) do
    local copy = {}
    for k, v in pairs(part) do copy[k] = v end
    local importance = self.imatrix:importance(member.name, is_stack and i - 1 or nil)
      or group.importance[group.experts and i or 1]
    local share = is_stack and not group.experts and self:shares_of(member)[i] or 1
    copy.weights = core.awq_weights(importance, part.col_scale, share, awq.TEMPER)
    if put.fit == "imatrix" then
      copy.importance = core.awq_weights(importance, part.col_scale)
    end
    put.parts[i] = copy
  end
  return put
end

-- Adds the errors of a member, relative to its outputs, to the units' sums.
function Search:add_errors(group, member, sums)
  local rows = math.max(1, awq.SAMPLE // member.tensor.cols)
  local wrong, all, code = self.writer:damage(self:put_of(group, member), rows)
  if not wrong then return nil, all, code end
  if group.experts then
    for i = 1, #wrong do sums[i] = sums[i] + (all[i] > 0 and wrong[i] / all[i] or 0) end
    return true
  end
  local error, size = 0, 0
  for i = 1, #wrong do error, size = error + wrong[i], size + all[i] end
  sums[1] = sums[1] + (size > 0 and error / size or 0)
  return true
end

-- Relative errors of all that is rounded, added up for each unit: to first order those of gate and
-- up, or of values and of what reads them, add up in what the block puts out, whatever units each
-- is in.
function Search:score(group)
  local sums, members = {}, table.move(group.readers, 1, #group.readers, 1, {})
  for u = 1, units(group) do sums[u] = 0 end
  members[#members + 1] = group.rows
  for _, member in ipairs(members) do
    if is_quantized(member) then
      local ok, message, code = self:add_errors(group, member, sums)
      if not ok then return nil, message, code end
    end
  end
  return sums
end

-- ---- the search --------------------------------------------------------------------------------

---@class moonlet.awq.Result
---@field name string    what was divided
---@field expert integer?  0-based
---@field alpha number   strength; 0: nothing was folded, unless gain says so
---@field gain number
---@field before number? relative error without scales, summed over the readers
---@field after number?

-- The scales of a unit; nil for none.
local function scales(group, unit, alpha, gain, share, least)
  if alpha == 0 and gain == 1 then return nil end
  local outer, times, inner = table.unpack(group.span)
  return core.awq_scales(group.importance[unit], outer, times, inner, alpha, gain, share, least)
end

-- Tries one more strength and gain (nil: the unit's best so far); `best` remembers the least error
-- of each unit, of equals the first.
function Search:try(group, alpha, gain, best)
  local tried = {}
  for u = 1, units(group) do
    local g = gain or best[u].first_gain
    tried[u] = { gain = g, s = scales(group, u, alpha, g, QUIET, 0) }
    local ok, message, code = self:apply(group, u, tried[u].s)
    if not ok then return nil, message, code end
  end
  local sums, message, code = self:score(group)
  if not sums then return nil, message, code end
  for u, b in ipairs(best) do
    b.before = b.before or sums[u]
    if not b.after or sums[u] < b.after then
      b.after, b.alpha, b.gain, b.s = sums[u], alpha, tried[u].gain, tried[u].s
    end
  end
  return true
end

local function needs_gain(group)
  for _, member in ipairs(group.readers) do
    if member.decision.mode == "nvfp4" then return true end
  end
  return false
end

function Search:try_gains(group, best)
  for _, gain in ipairs(awq.GAINS) do
    if gain ~= 1 then
      local ok, message, code = self:try(group, 0, gain, best)
      if not ok then return nil, message, code end
    end
  end
  return true
end

---@return moonlet.awq.Result[]? results
---@return string? message
---@return string? code
function Search:search(group)
  local best = {}
  for u = 1, units(group) do
    best[u] = { name = group.name, expert = group.experts and u - 1 }
  end
  local ok, message, code = self:try(group, 0, 1, best)
  if ok and self.form.bare_nvfp4 and needs_gain(group) then
    ok, message, code = self:try_gains(group, best)
  end
  for _, b in ipairs(best) do b.first_gain = b.gain end
  for _, alpha in ipairs(awq.GRID) do
    if ok and alpha ~= 0 and not group.gain_only then
      ok, message, code = self:try(group, alpha, nil, best)
    end
  end
  for u, b in ipairs(best) do
    if ok then ok, message, code = self:apply(group, u, b.s) end
    b.s, b.first_gain = nil, nil
  end
  if not ok then return nil, message, code end
  return best
end

-- One strength for every unit, unjudged.
function Search:fixed(group, how)
  local results, gain = {}, how.gain or 1
  for u = 1, units(group) do
    local s = scales(group, u, how.alpha, gain, how.share or QUIET, how.least or 0)
    local ok, message, code = self:apply(group, u, s)
    if not ok then return nil, message, code end
    results[u] = { name = group.name, expert = group.experts and u - 1, alpha = how.alpha,
      gain = gain }
  end
  return results
end

-- What a search has found before.
function Search:again(group, results)
  for u, r in ipairs(results) do
    local ok, message, code = self:apply(group, u, scales(group, u, r.alpha, r.gain, QUIET, 0))
    if not ok then return nil, message, code end
  end
  return results
end

-- What the columns of each unit meet; nil if nothing is known about it.
local function importance_of(imatrix, group)
  for _, reader in ipairs(group.readers) do
    local list = {}
    for u = 1, units(group) do
      list[u] = imatrix:importance(reader.name, group.experts and u - 1 or nil)
    end
    if list[1] then return list end
  end
end

---@class moonlet.awq.options
---@field how "search"|"mlx-node"|{ alpha: number, gain: number? }
---@field numbers table     of the text stack
---@field decided { tensor: moonlet.Tensor, decision: table }[]  parts, which get scales, are those
---  of source.by_expert
---@field zero_centred boolean
---@field imatrix moonlet.Imatrix
---@field writer table
---@field form table
---@field flavour string?
---@field mx_rule string?
---@field fit_of (fun(d: table): string?)?  of a pair as in decided; default: minmax
---@field chosen table<string, moonlet.awq.Result[]>?  what a search that was cut off has found
---@field on_search (fun(results: moonlet.awq.Result[]): any, string?, string?)?  after each group
---  that was searched, to write it down; nil, message, code stops
---@field on_group (fun(done: integer, total: integer, name: string): boolean?)?  false stops

-- The results of one group, whose scales are in its parts then.
function Search:settle(group, how, o)
  if how ~= "search" then return self:fixed(group, how) end
  local chosen = o.chosen and o.chosen[group.name]
  if chosen and #chosen == units(group) then return self:again(group, chosen) end
  local found, message, code = self:search(group)
  if found and o.on_search then
    local ok
    ok, message, code = o.on_search(found)
    if not ok then return nil, message, code end
  end
  return found, message, code
end

---Folds scales into the groups that gain by it; into all groups that are meant if `how` says how
---much.
---@param o moonlet.awq.options
---@return moonlet.awq.Result[]? results
---@return string? message
---@return string? code
function awq.fold(o)
  local self = setmetatable({ imatrix = o.imatrix, writer = o.writer, form = o.form,
    zero_centred = o.zero_centred, flavour = o.flavour, mx_rule = o.mx_rule,
    fit_of = o.fit_of or function() end, values = {}, shares = {} }, Search)
  local how = o.how == "mlx-node" and MLX_NODE or o.how
  local groups, results = all_groups(o.numbers, o.form, members_of(o.decided)), {}
  for i, group in ipairs(groups) do
    local wanted = how == "search" or not how.has or how.has(group)
    group.importance = wanted and importance_of(o.imatrix, group) or nil
    if group.importance then
      local found, message, code = self:settle(group, how, o)
      if not found then return nil, message, code end
      table.move(found, 1, #found, #results + 1, results)
    end
    group.importance = nil
    if o.on_group and o.on_group(i, #groups, group.name) == false then
      return nil, "stopped", "cancelled"
    end
  end
  return results
end

---One line about what was folded.
---@param results moonlet.awq.Result[]
---@return string
function awq.summary(results)
  local folded, before, after = 0, 0, 0
  for _, r in ipairs(results) do
    if r.alpha ~= 0 or r.gain ~= 1 then folded = folded + 1 end
    before, after = before + (r.before or 0), after + (r.after or 0)
  end
  local line = ("awq: scales folded into %d of %d groups"):format(folded, #results)
  if before == 0 then return line end
  return ("%s; weighted errors are %.3f of what they were"):format(line, after / before)
end

return awq
