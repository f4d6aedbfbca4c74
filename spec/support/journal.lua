-- Journals of moonlet.partial: each line behind 16 digits of the SHA-256 of the digits of the line
-- before it and the line itself.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"

local journal = {}

---Changes a journal as one that a run might have written.
---@param path string
---@param change fun(line: string): string  of each line without its sum
function journal.edit(path, change)
  local lines, sum = {}, ""
  for line in checkpoint.slurp(path):gmatch("%x+ ([^\n]*)\n") do
    line = change(line)
    sum = core.sha256(sum .. line):sub(1, 16)
    lines[#lines + 1] = sum .. " " .. line .. "\n"
  end
  checkpoint.spit(path, table.concat(lines))
end

return journal
