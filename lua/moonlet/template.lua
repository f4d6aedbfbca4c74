--- The chat template of a checkpoint: from messages to the text of a prompt, as transformers'
--- apply_chat_template does it.
---
---   local chat = assert(template.open("model-dir"))
---   local prompt = assert(chat:render({ { role = "user", content = "Hi" } }))

local jinja = require "moonlet.jinja"
local json = require "moonlet.json"
local options = require "moonlet.options"
local sys = require "moonlet.sys"

local template = {}

-- What tokenizers name, and any other "..._token" of the configuration besides.
local SPECIAL_TOKEN = "_token$"
-- name -> a file of its own
local FILES = { default = "/chat_template.jinja",
  tool_use = "/additional_chat_templates/tool_use.jinja" }
-- transformers copies these to one another, the first that is set wins
-- (utils/chat_template_utils.py, _alias_reasoning_fields).
local REASONING_FIELDS = { "reasoning_content", "thinking", "reasoning" }

---@class moonlet.Template
---@field source string the Jinja text of the default template
local Template = {}
Template.__index = Template

-- Loading -------------------------------------------------------------------------------------

--- The content of a file by one of moonlet's readers; nil without a message when there is none.
local function optional(read, path)
  if not sys.exists(path) then return nil end
  return read(path)
end

--- A token is its text, or an object that holds it as `content`.
local function token_text(token)
  if type(token) == "string" then return token end
  if type(token) == "table" and type(token.content) == "string" then return token.content end
end

--- The special tokens of a tokenizer_config.json by name.
local function special_tokens(config)
  local tokens = {}
  for name, token in pairs(config) do
    if name:find(SPECIAL_TOKEN) then tokens[name] = token_text(token) end
  end
  if type(config.extra_special_tokens) == "table" then
    for name, token in pairs(config.extra_special_tokens) do
      if type(name) == "string" then tokens[name] = token_text(token) end
    end
  end
  return tokens
end

--- The sources a configuration holds, by name; {} when it holds none.
local function config_sources(config, path)
  local chat = config and config.chat_template
  if type(chat) == "string" then return { default = chat } end
  local sources = {}
  for i, entry in ipairs(type(chat) == "table" and chat or {}) do
    if type(entry) ~= "table" or type(entry.name) ~= "string"
      or type(entry.template) ~= "string" then
      return nil, ("%s: chat_template[%d] has no name and template"):format(path, i - 1), "format"
    end
    sources[entry.name] = entry.template
  end
  return sources
end

--- The template sources of a checkpoint. Files of their own come before the configuration.
local function find_sources(dir, config)
  local sources = {}
  for name, path in pairs(FILES) do
    local source, message, code = optional(sys.read_own_file, dir .. path)
    if message then return nil, message, code end
    sources[name] = source
  end
  if next(sources) then return sources end
  local processor, message, code = optional(json.read_object, dir .. "/chat_template.json")
  if message then return nil, message, code end
  sources, message, code = config_sources(processor, dir .. "/chat_template.json")
  if not sources or next(sources) then return sources, message, code end
  return config_sources(config, dir .. "/tokenizer_config.json")
end

local function compile_all(sources, name)
  local compiled = {}
  for key, source in pairs(sources) do
    local result, message, code = jinja.compile(source, { name = name })
    if not result then return nil, message, code end
    compiled[key] = result
  end
  return compiled
end

--- Makes a chat template from Jinja text.
---@param source string
---@param given? {name?: string, special_tokens?: table<string, string>} name: what messages begin
--- with ("chat template"); special_tokens: bos_token, eos_token and the like
---@return moonlet.Template? template
---@return string? message
---@return string? code "template"
function template.new(source, given)
  given = options.check(given, { name = "string", special_tokens = "table" })
  local compiled, message, code = compile_all({ default = source },
    given.name or "chat template")
  if not compiled then return nil, message, code end
  return setmetatable({ source = source, templates = compiled,
    tokens = given.special_tokens or {} }, Template)
end

--- Opens the chat template of a checkpoint: chat_template.jinja, chat_template.json or
--- tokenizer_config.json; special tokens come from tokenizer_config.json.
---@param dir string
---@return moonlet.Template? template
---@return string? message
---@return string? code "missing" if it has none, "io", "format" or "template"
function template.open(dir)
  local config, message, code = optional(json.read_object, dir .. "/tokenizer_config.json")
  if message then return nil, message, code end
  local sources
  sources, message, code = find_sources(dir, config)
  if not sources then return nil, message, code end
  if not next(sources) then
    return nil, dir .. ": no chat template (chat_template.jinja or chat_template in"
      .. " tokenizer_config.json)", "missing"
  end
  local compiled
  compiled, message, code = compile_all(sources, dir .. "/chat_template.jinja")
  if not compiled then return nil, message, code end
  return setmetatable({ source = sources.default or sources.tool_use, templates = compiled,
    tokens = special_tokens(config or {}) }, Template)
end

-- Rendering -----------------------------------------------------------------------------------

--- The message with its reasoning under every name that templates read.
local function with_reasoning(message)
  local reasoning
  for _, field in ipairs(REASONING_FIELDS) do
    if reasoning == nil and message[field] ~= json.null then reasoning = message[field] end
  end
  if reasoning == nil then return message end
  local copy, keys = { thinking = reasoning }, { "thinking" }
  for _, key in ipairs(json.keys(message)) do
    copy[key] = message[key]
    keys[#keys + 1] = key
  end
  copy.reasoning_content = reasoning
  keys[#keys + 1] = "reasoning_content"
  return json.object(copy, keys)
end

--- The messages as templates get them; nil and a message when they are no list of objects.
local function prepare(messages)
  if json.is_object(messages) and next(messages) ~= nil then
    return nil, "messages must be a list"
  end
  local out = {}
  for i, message in ipairs(messages) do
    if not json.is_object(message) then
      return nil, ("messages[%d] must be an object"):format(i - 1)
    end
    out[i] = with_reasoning(message)
  end
  return json.array(out)
end

--- transformers' choice among several templates.
local function choose(self, tools)
  if tools ~= nil and tools ~= json.null and self.templates.tool_use then
    return self.templates.tool_use
  end
  return self.templates.default or self.templates.tool_use
end

--- Renders a conversation. Messages and variables may be plain tables or come from moonlet.json;
--- json.null is None and an absent field is undefined.
---@param messages table[]
---@param variables? table tools, documents (None when absent), add_generation_prompt (true when
--- absent); every other field becomes a variable of the template, such as enable_thinking
---@return string? prompt
---@return string? message what the template raised, or where and why it failed
---@return string? code "template"
function Template:render(messages, variables)
  if type(messages) ~= "table" then options.misuse("render: messages must be a list of tables") end
  local prepared, problem = prepare(messages)
  if not prepared then return nil, problem, "template" end
  local context = {}
  for name, token in pairs(self.tokens) do context[name] = token end
  for name, option in pairs(variables or {}) do context[name] = option end
  context.messages = prepared
  if context.tools == nil then context.tools = json.null end
  if context.documents == nil then context.documents = json.null end
  if context.add_generation_prompt == nil then context.add_generation_prompt = true end
  local prompt, message, code = choose(self, context.tools):render(context)
  return prompt, message, code
end

return template
