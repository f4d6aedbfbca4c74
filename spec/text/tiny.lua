-- A tokenizer.json small enough to write by hand, for specs that change one thing in it.
local tiny = {}

-- GPT-2's printable character for a byte (openai/gpt-2, encoder.py, bytes_to_unicode)
local spelling, moved = {}, 0
for b = 0, 255 do
  local printable = b >= 0x21 and b <= 0x7e or b >= 0xa1 and b ~= 0xad
  spelling[b] = utf8.char(printable and b or 0x100 + moved)
  if not printable then moved = moved + 1 end
end

function tiny.spell(bytes)
  return (bytes:gsub(".", function(c) return spelling[c:byte()] end))
end

local function quote(s)
  return '"' .. s:gsub('[\\"]', "\\%0"):gsub("%c", function(c)
    return ("\\u%04x"):format(c:byte())
  end) .. '"'
end
tiny.quote = quote

-- The ids of single bytes are the bytes; further entries follow in order, then added tokens.
local PARTS = {
  entries = { "ab", "abc", " a" },
  merges = { { "a", "b" }, { "ab", "c" }, { " ", "a" } },
  pattern = [[\s+|\S+]],
  normalizer = '{"type":"NFC"}',
  split = '{"type":"Split","pattern":{"Regex":%s},"behavior":"Isolated","invert":false}',
  byte_level = '{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}',
  decoder = '{"type":"ByteLevel"}',
  post_processor = "null",
  model = '"type":"BPE","dropout":null,"byte_fallback":false',
  more = "",
  added = { '{"id":259,"content":"<s>","special":true}', '{"id":260,"content":"<t>"}' },
}

---The text of a tokenizer.json; `changes` replaces parts of the table above, and may give
---`pre_tokenizer`, `vocab` or `merge_list` as JSON text.
function tiny.json(changes)
  local p = setmetatable(changes or {}, { __index = PARTS })
  local vocab, merges = {}, {}
  for b = 0, 255 do vocab[#vocab + 1] = quote(spelling[b]) .. ":" .. b end
  for i, s in ipairs(p.entries) do
    vocab[#vocab + 1] = quote(tiny.spell(s)) .. ":" .. 255 + i
  end
  for i, m in ipairs(p.merges) do
    merges[i] = ("[%s,%s]"):format(quote(tiny.spell(m[1])), quote(tiny.spell(m[2])))
  end
  local pre = p.pre_tokenizer or ('{"type":"Sequence","pretokenizers":[%s,%s]}'):format(
    p.split:format(quote(p.pattern)), p.byte_level)
  return ([[{"version":"1.0","truncation":null,"padding":null,"added_tokens":[%s],
"normalizer":%s,"pre_tokenizer":%s,"post_processor":%s,"decoder":%s,
"model":{%s,"vocab":%s,"merges":%s}%s}]]):format(
    table.concat(p.added, ","), p.normalizer, pre, p.post_processor, p.decoder, p.model,
    p.vocab or "{" .. table.concat(vocab, ",") .. "}",
    p.merge_list or "[" .. table.concat(merges, ",") .. "]", p.more)
end

---A new directory with these files; remove it with tiny.remove.
function tiny.dir(files)
  local dir = os.tmpname()
  os.remove(dir)
  assert(os.execute("mkdir " .. dir))
  tiny.write(dir, files)
  return dir
end

function tiny.write(dir, files)
  for name, text in pairs(files) do
    local file <close> = assert(io.open(dir .. "/" .. name, "wb"))
    assert(file:write(text))
  end
end

function tiny.read(path)
  local file <close> = assert(io.open(path, "rb"))
  return file:read("a")
end

function tiny.remove(dir)
  assert(os.execute("rm -r " .. dir))
end

return tiny
