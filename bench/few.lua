-- Time of a few tokens at once, each weight being read once for all of them:
--   lua5.4 bench/few.lua DIR [threads] [rounds]
-- n tokens of one sequence, as speculation checks them, and one token of each of n sequences, as a
-- server decodes them: milliseconds, and in times as long as one token. Rows are measured in turn,
-- round after round; of each the least time is shown, as other programs only add to it. Ids are
-- drawn, so experts are chosen as variedly as by text.

package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
package.cpath = "./build/?.so;" .. package.cpath
local core = require "moonlet.core"
local moonlet = require "moonlet"

local SIZES <const> = { 1, 2, 3, 4, 6, 8, 12, 16 }
local CONTEXT <const> = 256

local function stop(text, code)
  io.stderr:write(text, "\n")
  os.exit(code)
end

local function count(text, max)
  local n = math.tointeger(tonumber(text))
  if arg[1] and n and n >= 1 and n <= max then return n end
  stop("usage: lua5.4 bench/few.lua DIR [threads] [rounds]", 2)
end

local threads, rounds = count(arg[2] or 4, 1024), count(arg[3] or 20, math.maxinteger)
local model <close>, problem = moonlet.open(arg[1], { threads = threads })
if not model then stop("few: " .. problem, 1) end
local vocabulary = model:info().config.vocab_size

local function draw(n)
  local ids = {}
  for i = 1, n do ids[i] = math.random(0, vocabulary - 1) end
  return ids
end

local sessions, snapshots = {}, {}
for i = 1, SIZES[#SIZES] do
  sessions[i] = assert(model:session { ctx = 2 * CONTEXT })
  assert(model:eval { { session = sessions[i], ids = draw(CONTEXT) } })
  snapshots[i] = assert(sessions[i]:snapshot())
end

-- The first token after a snapshot copies a page that both share: it is not measured.
local function seconds(n_sequences, n_tokens)
  local parts = {}
  for i = 1, n_sequences do
    assert(sessions[i]:restore(snapshots[i]))
    assert(sessions[i]:step(0))
    parts[i] = { session = sessions[i], ids = draw(n_tokens) }
  end
  local start = core.seconds()
  assert(model:eval(parts))
  return core.seconds() - start
end

local tokens, sequences = {}, {}
for _ = 1, rounds do
  for i, n in ipairs(SIZES) do
    tokens[i] = math.min(tokens[i] or math.huge, seconds(1, n))
    sequences[i] = math.min(sequences[i] or math.huge, seconds(n, 1))
  end
end

print("   n    tokens of one sequence      sequences")
for i, n in ipairs(SIZES) do
  print(("%4d %12.2f ms %6.2fx %12.2f ms %6.2fx"):format(n, 1000 * tokens[i],
    tokens[i] / tokens[1], 1000 * sequences[i], sequences[i] / sequences[1]))
end
for _, session in ipairs(sessions) do session:close() end
