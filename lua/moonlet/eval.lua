--- Perplexity.
--
-- Text: the whole file is tokenized at once and cut into fixed windows (512 tokens); each is
-- evaluated from an empty state and all its tokens but the first are scored.
--
-- Dialogues (JSON Lines of {messages, tools, template}): every assistant turn is scored in the
-- context it would have been generated in: the checkpoint's template renders the messages before
-- it with add_generation_prompt, and the turn's own text follows, tokenized apart from the prompt
-- as generated tokens are. Scored are the turn's tokens up to and including its last stop token;
-- what the template puts behind that (a line feed) is context only. Turns whose rendering continues
-- the one before share a pass.
local json = require "moonlet.json"
local options = require "moonlet.options"
local sys = require "moonlet.sys"

local eval = {}

local WINDOW <const> = 512

local function count_words(text)
  return select(2, text:gsub("%S+", ""))
end

local function sum_tensor(tensor)
  local bytes, total = tensor:bytes(), 0
  for at = 1, #bytes, 4 do total = total + string.unpack("<f", bytes, at) end
  return total
end

-- ---- text ---------------------------------------------------------------------------------------

local function text_sequences(model, text, window)
  local ids, message, code = model:encode(text, { special = false })
  if not ids then return nil, message, code end
  local sequences = {}
  for first = 1, #ids - 1, window do
    local last = math.min(first + window - 1, #ids)
    if last > first then
      local piece = table.move(ids, first, last, 1, {})
      local targets = table.move(ids, first + 1, last, 1, {})
      targets[#piece] = -1
      sequences[#sequences + 1] = { ids = piece, targets = targets }
    end
  end
  return sequences, count_words(text)
end

-- ---- dialogues ----------------------------------------------------------------------------------

local function starts_with(text, prefix)
  return text:sub(1, #prefix) == prefix
end

-- What two texts begin with in common, in whole characters and whole control strings.
local function common_prefix(tokenizer, a, b)
  local n = 0
  while n < math.min(#a, #b) and a:byte(n + 1) == b:byte(n + 1) do n = n + 1 end
  if n == #a or n == #b then return a:sub(1, n) end
  while n > 0 and (b:byte(n + 1) & 0xC0) == 0x80 do n = n - 1 end
  local at = 1
  for _, id in ipairs(tokenizer:encode(b)) do
    local text = tokenizer:token_bytes(id)
    if #tokenizer:encode(text, { special = false }) > 1 then -- a control string
      local first, last = b:find(text, at, true)
      if not first or first > n then break end
      if last > n then n = first - 1 end
      at = last + 1
    end
  end
  return a:sub(1, n)
end

local function append(ids, more)
  table.move(more, 1, #more, #ids + 1, ids)
end

-- Adds the text of a turn to a sequence; its tokens up to the last stop token are targets.
local function add_turn(sequence, ids, is_stop)
  local scored = 0
  for i, id in ipairs(ids) do
    if is_stop[id] then scored = i end
  end
  if scored == 0 then scored = #ids end
  local past = #sequence.ids
  append(sequence.ids, ids)
  for i = past + 1, #sequence.ids do sequence.targets[i] = -1 end
  for i = 1, scored do
    if past + i > 1 then sequence.targets[past + i - 1] = ids[i] end
  end
end

local function add_context(sequence, ids)
  local past = #sequence.ids
  append(sequence.ids, ids)
  for i = past + 1, #sequence.ids do sequence.targets[i] = -1 end
end

-- One dialogue as sequences of ids with targets; n words scored.
local function dialogue_sequences(model, dialogue, is_stop)
  local kwargs = {}
  for key, value in pairs(dialogue.template or {}) do kwargs[key] = value end
  kwargs.tools = dialogue.tools
  local function render(n, generate)
    kwargs.add_generation_prompt = generate
    local part = json.array(table.move(dialogue.messages, 1, n, 1, {}))
    return model:render(part, kwargs)
  end

  local sequences, words, text = {}, 0, nil
  for i, turn in ipairs(dialogue.messages) do
    if turn.role == "assistant" then
      local prompt, through, message, code
      prompt, message, code = render(i - 1, true)
      if not prompt then return nil, message, code end
      through, message, code = render(i, false)
      if not through then return nil, message, code end
      -- A template may open a think block in the prompt that it does not show in the turn.
      prompt = common_prefix(model.tokenizer, prompt, through)
      local sequence = sequences[#sequences]
      if not (text and starts_with(prompt, text)) then
        sequence, text = { ids = {}, targets = {} }, ""
        sequences[#sequences + 1] = sequence
      end
      add_context(sequence, model:encode(prompt:sub(#text + 1)))
      local answer = through:sub(#prompt + 1)
      add_turn(sequence, model:encode(answer), is_stop)
      words = words + count_words(answer)
      text = through
    end
  end
  return sequences, words
end

-- What is wrong with a line's value; nil if nothing is.
local function dialogue_problem(row)
  if not json.is_object(row) or not json.is_array(row.messages) then
    return "an object with messages expected"
  end
  for i, turn in ipairs(row.messages) do
    if not json.is_object(turn) then return ("messages[%d] is not an object"):format(i - 1) end
  end
  if row.tools ~= nil and row.tools ~= json.null and not json.is_array(row.tools) then
    return "tools is not an array"
  end
  if row.template ~= nil and not json.is_object(row.template) then
    return "template is not an object"
  end
end

local function read_dialogues(path)
  local text, message, code = sys.read_file(path)
  if not text then return nil, message, code end
  local dialogues, n = {}, 0
  for line in text:gmatch("[^\n]*") do
    n = n + 1
    if line:find("%S") then
      local row, why
      row, why, code = json.decode(line, { name = ("%s:%d"):format(path, n) })
      if row == nil then return nil, why, code end
      why = dialogue_problem(row)
      if why then
        return nil, ("%s:%d: %s"):format(path, n, why), "format"
      end
      dialogues[#dialogues + 1] = row
    end
  end
  return dialogues
end

local function chat_sequences(model, path)
  if not model.tokenizer then return model:encode("") end -- says what is missing
  local dialogues, message, code = read_dialogues(path)
  if not dialogues then return nil, message, code end
  local is_stop, all, words = {}, {}, 0
  for _, id in ipairs(model.stop_ids) do is_stop[id] = true end
  for i, dialogue in ipairs(dialogues) do
    local sequences, n = dialogue_sequences(model, dialogue, is_stop)
    if not sequences then return nil, ("%s: dialogue %d: %s"):format(path, i, n), "template" end
    append(all, sequences)
    words = words + n
  end
  return all, words
end

-- ---- scoring ------------------------------------------------------------------------------------

local function score(model, sequences, on_progress)
  local longest, done, total = 1, 0, 0
  for _, sequence in ipairs(sequences) do
    longest = math.max(longest, #sequence.ids)
    total = total + #sequence.ids
  end
  local session <close>, message, code = model:session { ctx = longest }
  if not session then return nil, message, code end
  local nll, tokens = 0, 0
  for _, sequence in ipairs(sequences) do
    session:reset()
    local tensor
    tensor, message, code = session:score(sequence.ids, sequence.targets)
    if not tensor then return nil, message, code end
    nll = nll + sum_tensor(tensor)
    tensor:close()
    for _, id in ipairs(sequence.targets) do tokens = tokens + (id >= 0 and 1 or 0) end
    done = done + #sequence.ids
    if on_progress then on_progress(done, total) end
  end
  return nll, tokens
end

---@param model moonlet.Model
---@param opts { file?: string, text?: string, chat?: string, window?: integer,
---  on_progress?: fun(done: integer, total: integer) } exactly one of file, text and chat
---@return table? result nll (sum, nats), tokens scored, perplexity = exp(nll / tokens), words,
---  word_perplexity = exp(nll / words)
---@return string? message, string? code
function eval.perplexity(model, opts)
  opts = options.check(opts, { file = "string", text = "string", chat = "string",
    window = "integer", on_progress = "function" })
  local sources = (opts.file and 1 or 0) + (opts.text and 1 or 0) + (opts.chat and 1 or 0)
  if sources ~= 1 then options.misuse("one of file, text and chat expected") end
  local window = opts.window or WINDOW
  if window < 2 then options.misuse("option 'window': at least 2 expected") end

  local sequences, words, code
  if opts.chat then
    sequences, words, code = chat_sequences(model, opts.chat)
  else
    local text = opts.text
    if not text then
      local message
      text, message, code = sys.read_file(opts.file)
      if not text then return nil, message, code end
    end
    sequences, words, code = text_sequences(model, text, window)
  end
  if not sequences then return nil, words, code end
  if #sequences == 0 then return nil, "nothing to score: fewer than two tokens", "range" end

  local nll, tokens
  nll, tokens, code = score(model, sequences, opts.on_progress)
  if not nll then return nil, tokens, code end
  if nll ~= nll or nll == math.huge then
    local _, why = model:check_finite()
    return nil, "the model's logits are not finite" .. (why and ": " .. why or ""), "range"
  end
  return {
    nll = nll,
    tokens = tokens,
    perplexity = math.exp(nll / tokens),
    words = words,
    word_perplexity = math.exp(nll / math.max(words, 1)),
  }
end

return eval
