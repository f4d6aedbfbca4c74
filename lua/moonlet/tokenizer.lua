--- Tokenizers: text to token ids and back, as the checkpoint's own tokenizer.json says.
local core = require "moonlet.core"

---@class moonlet.EncodeOptions
---@field special? boolean whether control strings such as <|im_end|> become tokens (default true)
---@field plain? integer[][]|moonlet.Ids {{first, last}, ...}, or all of them in one list: positions
--- as in string.sub, ascending, where they do not: text that came from a user
---@field packed? boolean the result is a moonlet.Ids

---Integers in four bytes each, where a table would be large; #list is their number.
---@class moonlet.Ids
---@field append fun(self, more: integer[]|moonlet.Ids|integer)
---@field slice fun(self, first?: integer, last?: integer): integer[] those there are of them
---@field close fun(self) empties it

---@class moonlet.TokenizerStream
---@field step fun(self, id: integer): string?, string?, string? text that may be shown after this
--- token: whole characters; bytes that may still become one are held back
---@field finish fun(self): string what is left, U+FFFD if it broke off inside a character
---@field close fun(self)

---@class moonlet.Encoding
---@field fd fun(self): integer can be read once it is done
---@field result fun(self): integer[]|moonlet.Ids|nil, string?, string? waits for the end
---@field close fun(self)

---Immutable; ids are those of the model, from 0. Close it, or leave it to <close> or the collector.
---@class moonlet.Tokenizer
---@field encode fun(self, text: string, opts?: moonlet.EncodeOptions): integer[]|moonlet.Ids
---@field start fun(self, text: string, opts?: moonlet.EncodeOptions): moonlet.Encoding the same in
--- the background
---@field decode fun(self, ids: integer[], opts?: {skip_special?: boolean}): string?, string?,
--- string? broken UTF-8 becomes U+FFFD; nil, message, "range" for an id without token
---@field stream fun(self, opts?: {skip_special?: boolean}): moonlet.TokenizerStream
---@field split fun(self, text: string): string[] the pieces that are merged separately, after NFC
---@field id fun(self, token: string): integer? of a control string, or of an entry as
--- tokenizer.json spells it ("Ġthe")
---@field token_bytes fun(self, id: integer): string? the bytes a token stands for
---@field n_vocab fun(self): integer highest id + 1
---@field is_special fun(self, id: integer): boolean
---@field close fun(self)

local tokenizer = {}

---@return moonlet.Ids
function tokenizer.new_ids() return core.ids() end

---@param path string directory that holds tokenizer.json (and may hold tokenizer_config.json, whose
--- added_tokens_decoder is honoured), or the file
---@return moonlet.Tokenizer? tokenizer, string? message, string? code
function tokenizer.open(path)
  return core.tok_open(path)
end

return tokenizer
