--- What is scored: texts and dialogues as sequences { ids, targets }, targets[i] the token that
-- follows ids[i], or -1 where nothing is scored.
--
-- Text: the whole file is tokenized at once and cut into fixed windows (512 tokens); each is
-- evaluated from an empty state and all its tokens but the first are scored.
--
-- Protocol "card", the one behind the word perplexities on the model cards of TurboQuant's MLX
-- builds (mlx-swift-lm, Tests/Benchmarks/InferenceBenchmark.swift at 83ff028): one sequence of the
-- text's first N tokens, no BOS, every token but the first scored, words counted in what the N
-- tokens decode to. It feeds the model in chunks of 2048 with a cache, on which nothing depends
-- here.
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

local sequences = {}

local WINDOW <const> = 512

local function count_words(text)
  return select(2, text:gsub("%S+", ""))
end

-- The items of a list that a range { first, last } names.
local function select_range(list, range, what)
  if not range then return list end
  local first, last = range[1], math.min(range[2] or #list, #list)
  if first > #list then
    return nil, ("there are %d %ss, none from %d on"):format(#list, what, first), "range"
  end
  return table.move(list, first, last, 1, {})
end

-- ---- text ---------------------------------------------------------------------------------------

local function of_text(model, text, window, range)
  local ids, message, code = model:encode(text, { special = false })
  if not ids then return nil, message, code end
  local list = {}
  for first = 1, #ids - 1, window do
    local last = math.min(first + window - 1, #ids)
    if last > first then
      local piece = table.move(ids, first, last, 1, {})
      local targets = table.move(ids, first + 1, last, 1, {})
      targets[#piece] = -1
      list[#list + 1] = { ids = piece, targets = targets }
    end
  end
  if not range then return list, count_words(text) end
  list, message, code = select_range(list, range, "window")
  if not list then return nil, message, code end
  -- Windows end within words: what they hold together is counted, as of the whole text.
  local first, n = (range[1] - 1) * window + 1, 0
  for _, sequence in ipairs(list) do n = n + #sequence.ids end
  if first + n == #ids then n = n + 1 end -- a token that is no window by itself
  return list, count_words(model:decode(table.move(ids, first, first + n - 1, 1, {})))
end

local function of_card(model, text, n)
  local ids, message, code = model:encode(text, { special = false })
  if not ids then return nil, message, code end
  local notes = #ids < n and { ("protocol card was to take %d tokens, the text has %d"):format(n,
    #ids) } or nil
  ids = table.move(ids, 1, math.min(n, #ids), 1, {})
  if #ids < 2 then return {}, 0 end
  local targets = table.move(ids, 2, #ids, 1, {})
  targets[#ids] = -1
  return { { ids = ids, targets = targets } }, count_words(model:decode(ids)), notes
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
local function of_dialogue(model, dialogue, is_stop)
  local kwargs = {}
  for key, value in pairs(dialogue.template or {}) do kwargs[key] = value end
  kwargs.tools = dialogue.tools
  local function render(n, generate)
    kwargs.add_generation_prompt = generate
    local part = json.array(table.move(dialogue.messages, 1, n, 1, {}))
    return model:render(part, kwargs)
  end

  local list, words, text = {}, 0, nil
  for i, turn in ipairs(dialogue.messages) do
    if turn.role == "assistant" then
      local prompt, through, message, code
      prompt, message, code = render(i - 1, true)
      if not prompt then return nil, message, code end
      through, message, code = render(i, false)
      if not through then return nil, message, code end
      -- A template may open a think block in the prompt that it does not show in the turn.
      prompt = common_prefix(model.tokenizer, prompt, through)
      local sequence = list[#list]
      if not (text and starts_with(prompt, text)) then
        sequence, text = { ids = {}, targets = {} }, ""
        list[#list + 1] = sequence
      end
      add_context(sequence, model:encode(prompt:sub(#text + 1)))
      local answer = through:sub(#prompt + 1)
      add_turn(sequence, model:encode(answer), is_stop)
      words = words + count_words(answer)
      text = through
    end
  end
  return list, words
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

local function of_dialogues(model, path, range)
  if not model.tokenizer then return model:encode("") end -- says what is missing
  local dialogues, message, code = read_dialogues(path)
  if not dialogues then return nil, message, code end
  local first = range and range[1] or 1
  dialogues, message, code = select_range(dialogues, range, "dialogue")
  if not dialogues then return nil, ("%s: %s"):format(path, message), code end
  local is_stop, all, words = {}, {}, 0
  local limit = model.core:info().config.max_position_embeddings
  for _, id in ipairs(model.stop_ids) do is_stop[id] = true end
  for i, dialogue in ipairs(dialogues) do
    local list, n = of_dialogue(model, dialogue, is_stop)
    if not list then
      return nil, ("%s: dialogue %d: %s"):format(path, first + i - 1, n), "template"
    end
    for _, sequence in ipairs(list) do
      if #sequence.ids > limit then
        return nil, ("%s: dialogue %d: %d tokens in a row, the model takes %d"):format(path,
          first + i - 1, #sequence.ids, limit), "range"
      end
    end
    append(all, list)
    words = words + n
  end
  return all, words
end

-- ---- options ------------------------------------------------------------------------------------

---Option keys that say what is scored, for options.check.
sequences.OPTIONS = { file = "string", text = "string", chat = "string", window = "integer",
  windows = "table", dialogues = "table", protocol = "string", tokens = "integer" }

local function check_range(opts, key, source)
  local range = opts[key]
  if not range then return end
  if not source then options.misuse(("option '%s' belongs to another kind of text"):format(key)) end
  local first, last = range[1], range[2]
  if math.type(first) ~= "integer" or first < 1 or #range > 2
    or last ~= nil and (math.type(last) ~= "integer" or last < first) then
    options.misuse(("option '%s': { first, last } expected"):format(key))
  end
end

local function check_protocol(opts)
  local card = opts.protocol == "card"
  options.choice(opts, "protocol", { "windows", "card" })
  if card and (opts.chat or opts.window or opts.windows) then
    options.misuse("protocol 'card' takes a text and tokens, nothing else")
  end
  if card ~= (opts.tokens ~= nil) then
    options.misuse("protocol 'card' and option 'tokens' go together")
  end
  if card and opts.tokens < 2 then options.misuse("option 'tokens': at least 2 expected") end
end

---Whether the options name a text at all.
function sequences.given(opts)
  return opts.file or opts.text or opts.chat
end

---@param model moonlet.Model its tokenizer and template
---@param opts { file?: string, text?: string, chat?: string, window?: integer,
---  windows?: integer[], dialogues?: integer[], protocol?: "windows"|"card", tokens?: integer }
---  exactly one of file, text and chat; windows and dialogues are { first, last } of those to
---  take, from 1, last left out for all the rest; tokens go with protocol "card"
---@return { ids: integer[], targets: integer[] }[]? list
---@return integer|string words_or_message
---@return string|string[]|nil code_or_notes  notes: lines that the user should read, if any
function sequences.read(model, opts)
  local sources = (opts.file and 1 or 0) + (opts.text and 1 or 0) + (opts.chat and 1 or 0)
  if sources ~= 1 then options.misuse("one of file, text and chat expected") end
  local window = opts.window or WINDOW
  if window < 2 then options.misuse("option 'window': at least 2 expected") end
  check_protocol(opts)
  check_range(opts, "windows", not opts.chat)
  check_range(opts, "dialogues", opts.chat)

  local list, words, code -- or notes, with a list
  if opts.chat then
    list, words, code = of_dialogues(model, opts.chat, opts.dialogues)
  else
    local text = opts.text
    if not text then
      local message
      text, message, code = sys.read_file(opts.file)
      if not text then return nil, message, code end
    end
    if opts.protocol == "card" then
      list, words, code = of_card(model, text, opts.tokens)
    else
      list, words, code = of_text(model, text, window, opts.windows)
    end
  end
  if not list then return nil, words, code end
  if #list == 0 then
    return nil, opts.chat and opts.chat .. ": no assistant says anything in it"
      or (opts.file or "the text") .. ": fewer than two tokens", "range"
  end
  return list, words, code
end

---@param list { ids: integer[] }[]
---@return integer longest, integer total tokens
function sequences.lengths(list)
  local longest, total = 1, 0
  for _, sequence in ipairs(list) do
    longest = math.max(longest, #sequence.ids)
    total = total + #sequence.ids
  end
  return longest, total
end

return sequences
