--- An answer as blocks, which is how Anthropic's messages and OpenAI's responses have it: each a
--- stretch of reasoning or text, or a call, that begins, grows and ends before the next begins.

local json = require "moonlet.json"

local blocks = {}

---@class moonlet.server.Block
---@field kind string "reasoning", "content" or "call"
---@field index integer from 0
---@field text string so far; of a call its arguments as JSON
---@field call { id: string, name: string, arguments: table? }? arguments when it is complete
---@field is_cut boolean? the answer ended in it, for want of room or in the middle of a call

---@class moonlet.server.BlockHandler
---@field begin fun(block: moonlet.server.Block)
---@field grow fun(block: moonlet.server.Block, text: string)
---@field done fun(block: moonlet.server.Block)

local Builder = {}
Builder.__index = Builder

local function close(self)
  if not self.open then return end
  self.handler.done(self.open)
  self.open = nil
end

local function open(self, kind, call)
  close(self)
  self.open = { kind = kind, index = #self.list, text = "", call = call }
  self.list[#self.list + 1] = self.open
  self.handler.begin(self.open)
end

local function grow(self, text)
  self.open.text = self.open.text .. text
  self.handler.grow(self.open, text)
end

local function add_text(self, kind, text)
  if not self.open or self.open.kind ~= kind then open(self, kind) end
  grow(self, text)
end

-- By the kind of a part.
local TAKE <const> = {}

function TAKE.reasoning(self, part) add_text(self, "reasoning", part.text) end

function TAKE.content(self, part) add_text(self, "content", part.text) end

function TAKE.call_start(self, part) open(self, "call", { id = part.id, name = part.name }) end

function TAKE.call_arguments(self, part) grow(self, part.text) end

-- A call is open where it was shown as it grew.
TAKE["call"] = function(self, part)
  if not (self.open and self.open.kind == "call") then
    open(self, "call", { id = part.id, name = part.name })
    grow(self, json.encode(part.arguments))
  end
  self.open.call.arguments = part.arguments
  close(self)
end

-- What was to become a call is text, unless it has been shown as a call so far: its arguments then
-- stay open, so that nobody takes them for complete.
function TAKE.unfinished(self, part)
  if not (self.open and self.open.kind == "call") then add_text(self, "content", part.text) end
end

TAKE["end"] = function(self, part)
  if self.open then self.open.is_cut = part.reason == "length" or self.open.kind == "call" end
  close(self)
end

---Runs the only choice of a run to its end.
---@param exchange moonlet.server.Exchange
---@param run moonlet.server.Run
---@param handler moonlet.server.BlockHandler
---@param idle? fun(): number see Run:each
---@return moonlet.server.Block[]? list nil when the client has gone
---@return table ended the part of kind "end"; a failure is raised
function blocks.run(exchange, run, handler, idle)
  local self = setmetatable({ handler = handler, list = {} }, Builder)
  local is_read = run:answer(exchange, function(_, part) TAKE[part.kind](self, part) end, idle)
  return is_read and self.list or nil, run.choices[1].ended
end

local function nothing() end

---For answers that are not streamed.
blocks.SILENT = { begin = nothing, grow = nothing, done = nothing }

return blocks
