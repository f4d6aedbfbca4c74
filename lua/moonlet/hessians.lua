-- hessians: whom the file of Hessians that a calibration wrote serves, for encoding with error
-- feedback (csrc/quant/gptq.h).

local core = require "moonlet.core"
local gguf_names = require "moonlet.gguf_names"
local json = require "moonlet.json"
local sites = require "moonlet.sites"

---@class moonlet.Hessians
---@field path string
---@field record table   what moonlet.json says about it
---@field model string?   directory that it was made with
---@field shapes table<string, integer[]>  site -> shape of its tensor
---@field counts table<string, integer[]>  site -> inputs seen, for each of its matrices
local Hessians = {}
Hessians.__index = Hessians

local hessians = {}

local function shape_text(shape) return table.concat(shape, " x ") end

-- The rows that each of a site's matrices met.
local function read_counts(self, set, name, info)
  local n = #info.shape == 2 and 1 or info.shape[1]
  local counts = set:info(name)
  if counts.dtype ~= "I64" or #counts.shape ~= 1 or counts.shape[1] ~= n then
    return nil, ("%s: tensor %s is %s [%s], not I64 [%d]"):format(self.path, name, counts.dtype,
      shape_text(counts.shape), n), "format"
  end
  local bytes, list = set:read(name), {}
  for i = 1, n do list[i] = string.unpack("<i8", bytes, 8 * i - 7) end
  return list
end

local function read_sites(self, set)
  for _, name in ipairs(set:names()) do
    local info = set:info(name)
    if set:info(name .. ".counts") and #info.shape >= 2 then
      local counts, message, code = read_counts(self, set, name .. ".counts", info)
      if not counts then return nil, message, code end
      self.shapes[name], self.counts[name] = info.shape, counts
    end
  end
  if next(self.shapes) then return true end
  return nil, self.path .. ": there are no Hessians in it", "format"
end

---@param path string
---@return moonlet.Hessians? hessians
---@return string? message
---@return string? code
function hessians.open(path)
  local self = setmetatable({ path = path, shapes = {}, counts = {} }, Hessians)
  local opened, message, code = core.st_open(path)
  if not opened then return nil, message, code end
  local set <close> = opened
  local ok, hash
  ok, message, code = read_sites(self, set)
  if not ok then return nil, message, code end
  hash, message, code = core.sha256_file(path)
  if not hash then return nil, message, code end
  self.model = set:metadata "model"
  self.record = json.object({ name = path:match("[^/]+$"), sha256 = hash }, { "name", "sha256" })
  return self
end

-- Whether the matrices of a site with several are those of experts; elsewhere they are blocks of
-- one. The matrix that reads it does not tell: stacks of experts read what all tokens go through.
local function is_of_experts(site) return site:find "%.experts_%l+$" ~= nil end

-- One matrix, one for each expert, or a row of blocks of one.
local function same_size(site, shape, tensor)
  local n, side = #shape, shape[#shape]
  if shape[n - 1] ~= side or n > 3 then return false end
  if n == 2 then return side == tensor.cols end
  if not is_of_experts(site) then return shape[1] * side == tensor.cols end
  return side == tensor.cols and (#tensor.shape == 2 or shape[1] == tensor.shape[1])
end

-- Where an item's inputs were looked at; nil for what multiplies nothing: embeddings.
local function site_of(item) return sites.hessian(gguf_names.bare(item.tensor.name)) end

---Puts the Hessian of an item into its put, and the better choice of scales if none was made: these
---are not MLX's bytes anyway. false if it has none, nil for a file of another model.
---@param item moonlet.Item
---@return boolean? served
---@return string? message
---@return string? code
function Hessians:serve(item)
  local tensor, site = item.tensor, site_of(item)
  local shape = self.shapes[site]
  if not shape then return false end
  if not same_size(site, shape, tensor) then
    return nil, ("%s: tensor %s is %s, of another model: %s is %s"):format(self.path, site,
      shape_text(shape), tensor.name, shape_text(tensor.shape)), "range"
  end
  if shape[#shape] % item.put.group ~= 0 then return false end -- a group in several blocks
  if not is_of_experts(site) and self.counts[site][1] < 1 then return false end
  item.put.hessian = site
  item.put.expert = #shape == 3 and is_of_experts(site) and item.expert or nil
  item.put.fit = item.put.fit or "mse"
  return true
end

---How many of an item's experts no input reached.
---@param item moonlet.Item  that is served
---@return integer
function Hessians:unseen(item)
  local n, put = 0, item.put
  if not is_of_experts(put.hessian) then return 0 end
  for i, count in ipairs(self.counts[put.hessian]) do
    if count < 1 and (put.expert or i - 1) == i - 1 then n = n + 1 end
  end
  return n
end

local function and_others(list)
  return #list == 1 and list[1] or ("%s and %d more"):format(list[1], #list - 1)
end

---What to say about Hessians that no damping saved.
---@param files moonlet.File[]
---@param lost table<string, integer>  item -> how many of its Hessians
---@return string? note
function hessians.lost_note(files, lost)
  local list, n = {}, 0
  for _, file in ipairs(files) do
    for _, item in ipairs(file.items) do
      if lost[item.name] then
        list[#list + 1], n = item.name, n + lost[item.name]
      end
    end
  end
  if n == 0 then return nil end
  return ("%s cannot be factored, however damped: encoded without error feedback in %s")
    :format(n == 1 and "1 Hessian" or ("%d Hessians"):format(n), and_others(list))
end

-- The last name in a path; nil where that is none.
local function base_name(path)
  local name = path:gsub("/+$", ""):gsub("^.*/", "")
  return name:find "[^.]" and name or nil
end

-- Notes on what shapes do not tell of a file that was made with another model.
local function strangers(self, files, dir)
  local notes, n_layers, unused = {}, 0, {}
  for _, file in ipairs(files) do
    for _, item in ipairs(file.items) do
      n_layers = math.max(n_layers, item.tensor.n_layers or 0)
    end
  end
  for site in pairs(self.shapes) do
    if (tonumber(site:match "^layers%.(%d+)%.") or -1) >= n_layers then
      unused[#unused + 1] = site
    end
  end
  table.sort(unused)
  if #unused > 0 then
    notes[1] = ("%s of layers that this model has not: the file was made with a larger one"):format(
      #unused == 1 and "1 Hessian is" or ("%d Hessians are"):format(#unused))
  end
  local made, given = base_name(self.model or ""), base_name(core.real_path(dir) or dir)
  if made and given and made ~= given and made ~= base_name(dir) then
    notes[#notes + 1] = ("the Hessians were made with %s, this is %s"):format(made, given)
  end
  return notes
end

---Gives every item that is to be encoded with error feedback its Hessian.
---@param self moonlet.Hessians?
---@param files moonlet.File[]
---@param wanted fun(tensor: moonlet.Tensor): boolean
---@param dir string  of the model
---@return string[]? notes  what went without, and why
---@return string? message
---@return string? code
function hessians.serve(self, files, wanted, dir)
  local without, unseen, n_unseen, n_served = {}, {}, 0, 0
  local notes = self and strangers(self, files, dir) or {}
  for _, file in ipairs(files) do
    for _, item in ipairs(file.items) do
      if item.put.op == "encode" and site_of(item) and wanted(item.tensor) then
        local served, message, code = false, nil, nil
        if self then served, message, code = self:serve(item) end
        if served == nil then return nil, message, code end
        n_served = n_served + (served and 1 or 0)
        if not served then
          without[#without + 1] = item.name
        elseif self:unseen(item) > 0 then
          n_unseen = n_unseen + self:unseen(item)
          unseen[#unseen + 1] = item.name
        end
      end
    end
  end
  if #without > 0 then
    notes[#notes + 1] = self and ("no Hessian for %s: encoded without error feedback"):format(
      and_others(without)) or "no Hessians given: encoded without error feedback"
  end
  if self and n_served == 0 and #without == 0 then
    notes[#notes + 1] = "the Hessians change nothing: no matrix is encoded with error feedback"
  end
  if #unseen > 0 then
    notes[#notes + 1] = ("%s given nothing while the Hessians were made: encoded without error "
      .. "feedback in %s"):format(n_unseen == 1 and "1 expert was"
        or ("%d experts were"):format(n_unseen), and_others(unseen))
  end
  return notes
end

return hessians
