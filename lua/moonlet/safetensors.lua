--- Safetensors files: what is in them, their bytes, and writing one.
--
-- moonlet's own outputs (`moonlet forward --out`) are such files, and a script that compares or
-- edits tensors reads and writes them here. Numbers stay bytes: string.unpack reads small tensors.

local core = require "moonlet.core"

local safetensors = {}

---@class safetensors.info
---@field dtype string "F32", "BF16", "U8", ...
---@field shape integer[]
---@field bytes integer
---@field file string path of the file that holds it
---@field offset integer of the data in that file

---@class safetensors.set one file or all files of a checkpoint directory, mapped; close it
---@field names fun(self): string[] sorted
---@field info fun(self, name: string): safetensors.info? nil if there is no such tensor
---@field read fun(self, name: string, at?: integer, bytes?: integer): string raises on another name
---@field metadata fun(self, key: string): string? from the first file's __metadata__
---@field close fun(self)

---@class safetensors.entry
---@field name string
---@field dtype string
---@field shape integer[]
---@field data string little-endian, row-major

--- Opens a file or a checkpoint directory, whose index decides which shards count. Reads headers
--- only and checks every one of them against its file.
---@param path string
---@return safetensors.set? set
---@return string? message names the file and the tensor
---@return string? code
function safetensors.open(path)
  return core.st_open(path)
end

--- Writes one file, whole or not at all: to `path` .. ".partial", fsynced, then renamed.
---@param path string
---@param entries safetensors.entry[] laid out in this order
---@param metadata? table<string, string>
---@return boolean? ok
---@return string? message
---@return string? code
function safetensors.write(path, entries, metadata)
  return core.st_write(path, entries, metadata)
end

return safetensors
