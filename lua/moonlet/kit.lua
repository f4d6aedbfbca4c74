-- kit: building blocks for recipes; all pure. A recipe file gets them as its second argument.
--
-- The text of this file runs where recipes run, in their sandbox, so it requires nothing and uses
-- what recipes may use.

---@param formats table<string, table>  number formats: { bits = {...}, groups = {...} } by mode
---@param published table<string, function>  builders of the published recipes by name
---@return moonlet.Kit kit
---@return fun() finish  runs the checks of kit.at_end
return function(formats, published)
  ---@class moonlet.Kit
  local kit = {}

  kit.widths = formats.affine.bits

  -- Raises in the recipe's line if argument n of a function of the kit is not what it takes.
  local function check(ok, name, n, expected, got)
    if ok then return end
    error(("kit.%s: argument %d: %s expected, got %s"):format(name, n, expected,
      type(got) == "table" and "a table" or tostring(got)), 3)
  end

  local function is_table(x) return type(x) == "table" end

  local function is_tensor(x) return is_table(x) and type(x.cols) == "number" end

  local function is_decision(x) return is_table(x) and (x.mode == nil or formats[x.mode]) end

  -- ---- decisions -------------------------------------------------------------------------------

  function kit.affine(bits, group) return { mode = "affine", bits = bits, group = group } end

  function kit.keep() return { keep = "bf16" } end

  function kit.stored() return { keep = "stored" } end

  function kit.drop() return { drop = true } end

  -- The smallest affine width that is at least `bits`; the widest if there is none.
  function kit.snap(bits)
    check(type(bits) == "number", "snap", 1, "a number", bits)
    for _, b in ipairs(kit.widths) do
      if b >= bits then return b end
    end
    return kit.widths[#kit.widths]
  end

  -- Promotion pass: an affine decision of `bits` bits becomes modes[bits], any other stays.
  function kit.promote(decision, modes)
    check(is_decision(decision), "promote", 1, "a decision", decision)
    check(is_table(modes), "promote", 2, "a table of modes by bits", modes)
    local mode = decision.mode == "affine" and modes[decision.bits]
    check(not mode or formats[mode], "promote", 2, "a table of modes by bits", modes)
    return mode and { mode = mode, group = (formats[mode].groups or {})[1] } or decision
  end

  -- The decision if the tensor's rows divide into its groups, else keep.
  function kit.fit(tensor, decision)
    check(is_tensor(tensor), "fit", 1, "a tensor", tensor)
    check(is_decision(decision), "fit", 2, "a decision", decision)
    local group = decision.mode and (decision.group or (formats[decision.mode].groups or {})[1])
    if group and tensor.cols % group ~= 0 then return kit.keep() end
    return decision
  end

  -- ---- damage ----------------------------------------------------------------------------------

  -- Mean squared error of an encoded weight over its mean square, scales chosen with the least
  -- squared error: normal weights, 2^20 of them, in groups of 64. Groups of 32 and 128 have about
  -- 0.8 and 1.17 times that.
  local ERRORS = { [2] = 0.102, [3] = 0.0268, [4] = 0.0066, [5] = 0.00166, [6] = 0.00042,
    [8] = 0.000026 }
  local GROUP_ERRORS = { [32] = 0.8, [64] = 1, [128] = 1.17 }
  local FLOAT_ERRORS = { mxfp4 = 0.0125, nvfp4 = 0.0088, mxfp8 = 0.0007, fp8 = 0.0007 }

  -- The relative squared error that a decision leads to; 0 for what is kept.
  local function error_of(decision)
    if decision.mode == "affine" then
      return ERRORS[decision.bits] * GROUP_ERRORS[decision.group or 64]
    end
    return decision.mode and FLOAT_ERRORS[decision.mode] or 0
  end

  local function is_known(x)
    return is_decision(x) and (x.mode ~= "affine"
      or ERRORS[x.bits] and GROUP_ERRORS[x.group or 64] ~= nil)
  end

  function kit.error(decision)
    check(is_known(decision), "error", 1, "a decision", decision)
    return error_of(decision)
  end

  -- KL divergence, in nats per unit of relative squared error, of a class as a whole: measured on
  -- moonlet's demo model, a class at a time at 4 bits (moonlet eval kld --per-tensor --bits 4
  -- --group 64 --chat eval.jsonl). Dense feed-forward layers stand for experts and shared expert
  -- together.
  local WEIGHTS = {
    embed = 0.085, lm_head = 0.074, in_proj_qkv = 0.088, in_proj_z = 0.08, in_proj_a = 0.0029,
    in_proj_b = 0.0051, out_proj = 0.093, q_proj = 0.023, k_proj = 0.010, v_proj = 0.008,
    o_proj = 0.0088, router = 0.0123, shared_gate = 0.0012, expert_gate = 0.0155,
    expert_up = 0.0126, expert_down = 0.030, shared_gate_proj = 0.0031, shared_up_proj = 0.0030,
    shared_down_proj = 0.0103, gate_proj = 0.0186, up_proj = 0.0156, down_proj = 0.0403,
  }

  -- Divergence to be expected of one tensor under a decision: its share of its class.
  function kit.damage(tensor, decision)
    check(is_tensor(tensor), "damage", 1, "a tensor", tensor)
    check(is_known(decision), "damage", 2, "a decision", decision)
    local layers = tensor.layer and tensor.n_layers or 1
    return (WEIGHTS[tensor.class] or 0.01) / layers * error_of(decision)
  end

  -- The affine decisions that rows of a tensor divide into, narrow ones and small groups first.
  function kit.candidates(tensor)
    check(is_tensor(tensor), "candidates", 1, "a tensor", tensor)
    local list = {}
    for _, bits in ipairs(kit.widths) do
      for _, group in ipairs { 32, 64, 128 } do
        if tensor.cols % group == 0 then list[#list + 1] = kit.affine(bits, group) end
      end
    end
    return list
  end

  -- ---- options ---------------------------------------------------------------------------------

  -- True if the value is in the list.
  function kit.contains(list, x)
    check(is_table(list), "contains", 1, "a list", list)
    for _, y in ipairs(list) do
      if x == y then return true end
    end
    return false
  end

  -- Refuses options: the message reaches the user without a place in the file.
  function kit.expect(ok, message)
    if not ok then error(message, 0) end
  end

  local function is_strings(x)
    if type(x) ~= "table" then return false end
    for _, y in ipairs(x) do
      if type(y) ~= "string" then return false end
    end
    return true
  end

  local function words(list)
    local texts = {}
    for i, x in ipairs(list) do texts[i] = tostring(x) end
    return table.concat(texts, " ")
  end

  local function sorted_keys(t)
    local keys = {}
    for key in pairs(t) do keys[#keys + 1] = tostring(key) end
    table.sort(keys)
    return keys
  end

  -- Refuses options that are not in `allowed`, key -> list of values, or "boolean", or "number", or
  -- "strings" for a list of them. Returns the options.
  function kit.options(given, allowed)
    check(is_table(given), "options", 1, "a table of options", given)
    check(is_table(allowed), "options", 2, "a table of what they may be", allowed)
    local names = sorted_keys(allowed)
    for _, key in ipairs(sorted_keys(given)) do
      local values, value = allowed[key], given[key]
      kit.expect(values, ("no option '%s'; %s"):format(key,
        #names > 0 and "there are: " .. words(names) or "it takes none"))
      if values == "boolean" then
        kit.expect(type(value) == "boolean", key .. " must be true or false")
      elseif values == "number" then
        kit.expect(type(value) == "number", key .. " must be a number")
      elseif values == "strings" then
        kit.expect(is_strings(value), key .. " must be a list of texts")
      else
        kit.expect(kit.contains(values, value), ("%s must be %s%s"):format(key,
          #values > 1 and "one of " or "", words(values)))
      end
    end
    return given
  end

  -- ---- names -----------------------------------------------------------------------------------

  -- Whether the pattern occurs in the text; `*` in it stands for anything.
  function kit.glob(pattern, text)
    check(type(pattern) == "string", "glob", 1, "a text", pattern)
    check(type(text) == "string", "glob", 2, "a text", text)
    local from, at = 1, 1
    while at <= #pattern do
      local star = pattern:find("*", at, true) or #pattern + 1
      local first, last = text:find(pattern:sub(at, star - 1), from, true)
      if not first then return false end
      from, at = last + 1, star + 1
    end
    return true
  end

  -- ---- whole recipes ---------------------------------------------------------------------------

  -- What a published recipe returns for these options: its decider, base and defaults.
  function kit.recipe(name, options)
    kit.expect(published[name], ("kit.recipe: no published recipe named %s"):format(tostring(name)))
    return published[name](options or {}, kit)
  end

  local checks = {}

  -- A function that is called when the last tensor of a plan is decided on; it may refuse.
  function kit.at_end(fn)
    check(type(fn) == "function", "at_end", 1, "a function", fn)
    checks[#checks + 1] = fn
  end

  return kit, function()
    for _, fn in ipairs(checks) do fn() end
  end
end
