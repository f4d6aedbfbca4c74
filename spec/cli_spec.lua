-- The command line: what each misuse, each broken input and each --json answers.
-- Exit 0 success, 1 failure of the work, 2 misuse; one line "moonlet: ..." on stderr.
local json = require "moonlet.json"

local DEMO <const> = "examples/demo-model"
local LUA_PATHS <const> = "LUA_CPATH='" .. package.cpath:gsub("'", "") .. "' "

local dir

local function read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read("a")
  file:close()
  return text
end

local function write(name, text)
  local path = dir .. "/" .. name
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
  return path
end

-- "moonlet ARGUMENTS" through a shell; D stands for the scratch directory.
local function run(arguments, shell)
  local command = ("cd '%s' && %sexec bin/moonlet %s >%s/out 2>%s/err"):format(".", LUA_PATHS,
    arguments:gsub("%f[%w]D/", dir .. "/"), dir, dir)
  local _, _, code = os.execute((shell or "") .. "(" .. command .. ") </dev/null")
  return code, read(dir .. "/out"), read(dir .. "/err")
end

local function check(row)
  local code, out, err = run(row[1])
  assert.equal(row[2], code, row[1] .. "\n" .. err)
  assert.matches("^moonlet: [^\n]*\n$", err)
  assert.matches(row[3], err)
  assert.equal("", out)
end

setup(function()
  dir = os.tmpname()
  os.remove(dir)
  assert(os.execute("mkdir " .. dir))
  write("empty", "")
  assert(os.execute(("cp -r --no-preserve=mode examples/demo-model %s/model"):format(dir)))
  assert(os.execute(("ln -s model %s/link"):format(dir)))
  write("number.json", "5")
  write("object.json", "{}")
  write("hi.json", '[{"role": "user", "content": "hi"}]')
  write("null.json", "[null]")
  write("late.json", '[{"role":"user","content":"a"},{"role":"system","content":"b"}]')
  write("cut.json", '[{"role": "us')
  write("latin1.json", '[{"role": "user", "content": "\xe9"}]')
  write("line5.jsonl", '{"messages": []}\n5\n')
  write("line6.jsonl", '{"messages": [5]}\n')
  write("line7.jsonl", '{"messages": [], "template": 7}\n')
  write("line8.jsonl", '{"messages": [], "tools": 7}\n')
  write("line9.jsonl", '{"messages": []}\n{"mess\n')
  write("raises.lua", "error 'boom'")
  write("number.lua", "return function() return function() return 5 end end")
  write("loop.lua", "return function() return function() while true do end end end")
  write("os.lua", "return function() os.remove 'x' end")
end)

teardown(function() os.execute("rm -rf " .. dir) end)

describe("what a terminal is shown of texts from elsewhere", function()
  local output, sys = require "moonlet.cli.output", require "moonlet.sys"

  -- What output.stream writes of a piece.
  local function streamed(text, is_terminal)
    local io_write, isatty, shown = io.write, sys.isatty, nil
    sys.isatty = function(fd) return fd == 1 and is_terminal end -- luacheck: ignore 122
    io.write = function(piece) shown = piece; return true end -- luacheck: ignore 122
    output.stream { text = text }
    io.write, sys.isatty = io_write, isatty -- luacheck: ignore 122
    return shown
  end

  it("spells control characters and what turns the order around", function()
    for _, code in ipairs { 0, 8, 0xD, 0x1B, 0x7F, 0x80, 0x9F, 0x61C, 0x200E, 0x202A, 0x202E,
      0x2066, 0x2069 } do
      assert.equal(("a\\u{%X}b"):format(code), output.visible("a" .. utf8.char(code) .. "b"))
    end
    local harmless = "a\tb\nc\u{A0}\u{20AC}\u{2010}\u{202F}\u{2065}\u{1D11E}"
    assert.equal(harmless, output.visible(harmless))
    assert.equal("a\\u{9}b\\u{A}", output.visible_line "a\tb\n")
    assert.equal("\\u{1B}[2J", streamed("\27[2J", true))
    assert.equal("\27[2J", streamed("\27[2J", false))
  end)
end)

describe("the settings of quickstart", function()
  it("let a shell find the command from anywhere", function()
    local p = assert(io.popen([[here=$PWD; cd / && eval "$("$here/quickstart" env)" &&
      moonlet --version && command -v moonlet]]))
    local said = p:read("a")
    p:close()
    assert.matches("^moonlet [%d.]+\n/.*/bin/moonlet\n$", said)
  end)
end)

describe("a limit on the size of files", function()
  for _, row in ipairs {
    { "quantize D/q --recipe uniform", "q%.partial/model%.safetensors%.partial: cannot reserve" },
    { "imatrix --text LICENSE --chunks 1 -o D/i", "i%.partial/stream%-0: cannot .*reserve" },
    { "forward --ids 1,2 --out D/f", "f%.partial: cannot reserve" },
  } do
    it("fails the work like a full disk: " .. row[1], function()
      local code, out, err = run(row[1], "ulimit -f 8; ")
      assert.equal(1, code)
      assert.equal("", out)
      assert.matches("^moonlet: [^\n]*" .. row[2] .. "[^\n]*\n$", err)
      for _, left in ipairs { "q", "i", "f" } do
        assert.is_nil(io.open(("%s/%s.partial"):format(dir, left)))
      end
    end)
  end
end)

describe("misuse exits with 2", function()
  for _, row in ipairs {
    { "", 2, "a command is required %(try: moonlet %-%-help%)" },
    { "nosuch", 2, "unknown command 'nosuch'" },
    { "inspect --nosuch", 2, "unknown option '%-%-nosuch' %(try: moonlet inspect %-%-help%)" },
    { "inspect a b", 2, "too many arguments" },
    { "inspect ''", 2, "DIR must not be empty" },
    { "plan '' --recipe uniform", 2, "DIR must not be empty" },
    { "quantize '' D/q --recipe uniform", 2, "DIR must not be empty" },
    { "eval ppl --chat ''", 2, "'%-%-chat': must not be empty" },
    { "eval kld --reference '' --file a", 2, "'%-%-reference': must not be empty" },
    { "imatrix --text a -o ''", 2, "'%-o': must not be empty" },
    { "inspect --json=1", 2, "does not take arguments" },
    { "plan", 2, "missing option '%-%-recipe'" },
    { "plan --recipe ''", 2, "'%-%-recipe': must not be empty" },
    { "plan --recipe uniform --bits x", 2, "'%-%-bits': 1 or more expected, got 'x'" },
    { "plan --recipe uniform --bits 4.5", 2, "'%-%-bits': a whole number, 1 or more expected, got "
      .. "'4.5'; %-%-target 4.5bpw aims at a mean" },
    { "plan --recipe uniform --group 0.5", 2, "a whole number, 1 or more expected, got '0.5' %(" },
    { "plan --recipe uniform --group -64", 2, "'%-%-group': 1 or more expected, got '%-64'" },
    { "quantize --recipe uniform", 2, "missing argument" },
    { "quantize '' --recipe uniform", 2, "OUT must not be empty" },
    { "quantize D/q --recipe uniform --format gguf", 2, "'%-%-format' must be one of 'mlx'" },
    { "quantize D/q --recipe uniform --awq search", 2, "%-%-awq needs %-%-imatrix" },
    { "plan --recipe moonlet --target 8MB --set level=30", 2, "%-%-set level is what %-%-target" },
    { "plan --recipe budget --target 4.5", 2, "'4.5' is no size" },
    { "plan --recipe moonlet --target 8MB --imatrix a", 2, "goes with %-%-target and %-%-recipe" },
    { "plan --recipe budget --imatrix ''", 2, "'%-%-imatrix': must not be empty" },
    { "quantize D/q --recipe uniform --awq more", 2, "'%-%-awq' must be one of 'search'" },
    { "quantize D/q --recipe uniform --threads 0", 2, "'%-%-threads': 1 to 1024" },
    { "tokenize --decode 0x10", 2, "'0x10' is not a token id" },
    { "tokenize --decode 1e3", 2, "'1e3' is not a token id" },
    { "tokenize --decode 99999999999999999999", 2, "is not a token id" },
    { "tokenize --file D/hi.json examples/demo-model text", 2, "the text or %-%-file" },
    { "render", 2, "missing option '%-%-messages'" },
    { "render --messages D/hi.json --set x", 2, "NAME=VALUE expected" },
    { "render --messages D/hi.json --set enable_thinking=yes", 2, "true or false expected" },
    { "serve D/no --set enable_thinking=maybe", 2, "enable_thinking: true or false expected" },
    { "chat --set preserve_thinking=null", 2, "%-%-set preserve_thinking: true or false expected" },
    { "generate --chat a --set enable_thinking=1", 2, "true or false expected" },
    { "agent --set enable_thinking=False", 2, "true or false expected" },
    { "forward --ids 1,x --out D/f", 2, "'x' is not a token id" },
    { "forward --ids 1 --out D/f --want nosuch", 2, "'nosuch' is none of" },
    { "bench --depth 0,x", 2, "'%-%-depth': tokens as 0,4096 expected, got '0,x'" },
    { "bench --depth ''", 2, "'%-%-depth'" },
    { "bench --prompt 0 --gen 0", 2, "%-%-prompt and %-%-gen are both 0" },
    { "bench --rounds 0", 2, "'%-%-rounds': 1 or more" },
    { "bench --probe fast", 2, "'%-%-probe': a size" },
    { "bench --probe 0", 2, "'%-%-probe': a size as 512M or 4G expected, got '0'" },
    { "forward --ids 1 --out D/f --want ''", 2, "%-%-want: names nothing" },
    { "plan --recipe uniform --mode ''", 2, "'%-%-mode': must not be empty" },
    { "tokenize --file ''", 2, "'%-%-file': must not be empty" },
    { "render --messages ''", 2, "'%-%-messages': must not be empty" },
    { "render --messages D/hi.json --tools ''", 2, "'%-%-tools': must not be empty" },
    { "forward --ids '' --out D/f", 2, "'%-%-ids': must not be empty" },
    { "forward --ids ' ,' --out D/f", 2, "%-%-ids: names nothing" },
    { "forward --ids 1 --out ''", 2, "'%-%-out': must not be empty" },
    { "generate -p ''", 2, "'%-p': must not be empty" },
    { "generate --file ''", 2, "'%-%-file': must not be empty" },
    { "generate --chat a --tools ''", 2, "'%-%-tools': must not be empty" },
    { "agent --replay ''", 2, "'%-%-replay': must not be empty" },
    { "serve --api-key-file ''", 2, "'%-%-api%-key%-file': must not be empty" },
    { "serve --replay ''", 2, "'%-%-replay': must not be empty" },
    { "serve --hooks ''", 2, "'%-%-hooks': must not be empty" },
    { "eval report a --out b --title ''", 2, "'%-%-title': must not be empty" },
    { "plan --recipe uniform --bits 4 --bits 5", 2, "'%-%-bits' must be used at most 1 time" },
    { "render --messages a --messages b", 2, "'%-%-messages' must be used 1 time" },
    { "generate -p a --prompt b", 2, "must be used at most 1 time" },
    { "plan --recipe uniform --set bits=4 --set bits=5", 2, "%-%-set bits: given twice" },
    { "render --messages D/hi.json --set a=null --set a=1", 2, "%-%-set a: given twice" },
    { "bench --depth 5,0,5", 2, "'%-%-depth': 5 is named twice" },
    { "forward --ids 1 --out D/f --want logits,hidden,logits", 2, "'logits' is named twice" },
    { "eval report '' --out D/q", 2, "RESULT.json must not be empty" },
    { "inspect --json --json", 2, "'%-%-json' must be used at most 1 time" },
    { "eval ppl --file a --precision fast --precision exact", 2, "'%-%-precision' must be used at "
      .. "most 1 time %(try: moonlet eval ppl %-%-help%)" },
    { "generate", 2, "give one of %-p, %-%-chat and %-%-file" },
    { "generate -p a --chat b", 2, "give one of %-p, %-%-chat and %-%-file" },
    { "generate -p a --system b", 2, "go with %-%-chat" },
    { "generate -p a --threads -1", 2, "'%-%-threads': 1 to 1024 expected, got '%-1'" },
    { "generate -p a --threads 9999", 2, "'%-%-threads': 1 to 1024 expected, got '9999'" },
    { "generate -p a --threads abc", 2, "'%-%-threads': 1 to 1024 expected, got 'abc'" },
    { "generate -p a -n 0", 2, "'%-n': 1 or more expected, got '0'" },
    { "generate -p a -n -3", 2, "'%-n': 1 or more expected, got '%-3'" },
    { "generate -p a -n 99999999999999999999", 2, "'%-n': 1 or more expected" },
    { "generate -p a --seed x", 2, "'%-%-seed': an integer expected, got 'x'" },
    { "generate -p a --seed 1.5", 2, "'%-%-seed': an integer expected, got '1.5'" },
    { "agent --tools ''", 2, "'%-%-tools': must not be empty" },
    { "agent --tools read,fly", 2, "'%-%-tools': 'fly' is none of read,write,edit,list,grep,bash" },
    { "agent --tools read,grep,read", 2, "'%-%-tools': 'read' is named twice" },
    { "agent --tools ' ,'", 2, "'%-%-tools': must not be empty" },
    { "generate -p a --ctx 0", 2, "'%-%-ctx': 1 or more expected" },
    { "generate -p a --kv turbo4", 2, "'%-%-kv' must be one of 'f16', 'f32'" },
    { "generate -p a --precision half", 2, "'%-%-precision' must be one of" },
    { "generate -p a --seed x", 2, "'%-%-seed': .* expected, got 'x'" },
    { "generate -p a --temp x", 2, "'%-%-temp': a number expected, got 'x'" },
    { "generate -p a --temp -1", 2, "'%-%-temp': %-1 is not in" },
    { "generate -p a --temp nan", 2, "'%-%-temp': a number expected" },
    { "generate -p a --top-p 2", 2, "'%-%-top%-p': 2 is not in" },
    { "generate -p a --top-k 1.5", 2, "'%-%-top%-k': integer expected" },
    { "generate -p a --stop ''", 2, "'%-%-stop': must not be empty" },
    { "eval", 2, "a command is required" },
    { "eval nosuch", 2, "unknown command 'nosuch'" },
    { "eval ppl", 2, "give one of %-%-file and %-%-chat" },
    { "eval ppl --file D/empty --window 1", 2, "'%-%-window': 2 or more expected" },
    { "eval ppl --chat D/empty --window 9", 2, "belong to %-%-file" },
    { "eval ppl --file D/empty --dialogues 1-2", 2, "%-%-dialogues belongs to %-%-chat" },
    { "eval ppl --file D/empty --protocol card", 2, "card and %-%-tokens go together" },
    { "eval ppl --file D/empty --tokens 9", 2, "%-%-protocol card and %-%-tokens go together" },
    { "eval ppl --chat D/empty --tokens 9 --protocol card", 2, "nothing else" },
    { "eval ppl --chat D/empty --dialogues 0-2", 2, "A%-B, A%- or A expected, got '0%-2'" },
    { "eval kld --file D/empty", 2, "give one of %-%-reference, %-%-reference%-logits, " },
    { "eval kld --reference a --file b --mode mxfp4", 2, "%-%-mode belongs to %-%-per%-tensor" },
    { "eval kld --reference a --file b --by layer", 2, "%-%-by belongs to %-%-per%-tensor" },
    { "eval kld --reference a --report p --per-position ./p --file a", 2, "are one file" },
    { "eval kld --reference a --report p --per-position p.partial --file a", 2,
      "one of %-%-report and %-%-per%-position is or lies in the other's %.partial" },
    { "eval kld --save-logits D/q --report p --file a", 2, "%-%-report needs a reference" },
    { "eval kld --per-tensor --file b --fit imatrix", 2, "%-%-fit imatrix needs %-%-imatrix" },
    { "eval report --out a", 2, "missing argument 'results'" },
    { "eval report a", 2, "missing option '%-%-out'" },
    { "eval kld --per-tensor --by row --file b", 2, "must be one of 'class', 'layer', 'tensor'" },
    { "eval kld --per-tensor --file b --per-position p", 2, "needs a reference" },
    { "eval kld --reference a --save-logits b --file D/empty", 2, "give one of %-%-reference," },
    { "eval kld --reference a", 2, "give one of %-%-file and %-%-chat" },
    { "eval kld --save-logits D/q --per-position p --file a", 2, "needs a reference" },
    { "imatrix -o D/q", 2, "give %-%-text or %-%-chat" },
    { "quantize", 2, "missing argument 'OUT'" },
    { "quantize a D/q --recipe budget --target 9MiB --sensitivity kld --file f --dialogues 1-2", 2,
      "%-%-dialogues belongs to %-%-chat" },
    { "imatrix --text a", 2, "give %-o or %-%-hessians" },
    { "imatrix --text a -o D/q --hessians D/./q", 2, "%-o and %-%-hessians are one file" },
    { "imatrix --text a -o D/q.partial --hessians D/q", 2, "lies in the other's %.partial" },
    { "imatrix --text a -o D/q --chunk 1", 2, "'%-%-chunk': 2 or more expected" },
    { "imatrix --chat a -o D/q --chunks 1", 2, "%-%-chunk and %-%-chunks belong to %-%-text" },
    { "imatrix --text a -o D/q --dialogues 1-2", 2, "%-%-dialogues belongs to %-%-chat" },
  } do
    it("moonlet " .. row[1], function() check(row) end)
  end
end)

describe("a failure of the work exits with 1", function()
  for _, row in ipairs {
    { "inspect /nosuch", 1, "/nosuch/config%.json: No such file" },
    { "inspect /etc/passwd", 1, "/etc/passwd/config%.json: Not a directory" },
    { "plan /nosuch --recipe uniform", 1, "/nosuch/config%.json: No such file" },
    { "plan --recipe nosuch", 1, "no recipe named nosuch" },
    { "plan --recipe D/raises.lua", 1, "recipe .*raises%.lua:1: boom" },
    { "plan --recipe D/number.lua", 1, "a decision %(table%) expected, got number" },
    { "plan --recipe D/loop.lua", 1, "runs too long" },
    { "plan --recipe D/os.lua", 1, "global 'os'" },
    { "plan --recipe uniform --bits 7", 1, "bits must be one of 2 3 4 5 6 8" },
    { "quantize /nosuch D/q --recipe uniform", 1, "/nosuch" },
    { "quantize examples --recipe uniform", 1, "exists and is not empty" },
    { "quantize D/empty --recipe uniform", 1, "empty: .*Not a directory" },
    { "quantize examples/demo-model/q --recipe uniform", 1, "lies in the source" },
    { "quantize /proc/q --recipe uniform", 1, "/proc/q" },
    { "tokenize /nosuch hello", 1, "/nosuch" },
    { "tokenize --file /", 1, "/: Is a directory" },
    { "tokenize --decode 999999", 1, "token id 999999 is not in the vocabulary" },
    { "tokenize --decode -- -1", 1, "token id %-1 is not in the vocabulary" },
    { "render --messages /nosuch", 1, "/nosuch: No such file" },
    { "render --messages D/number.json", 1, "number%.json: a JSON array of messages" },
    { "render --messages D/object.json", 1, "object%.json: a JSON array of messages" },
    { "render --messages D/null.json", 1, "null%.json: a JSON array of messages" },
    { "render --messages D/cut.json", 1, "cut%.json: byte 10: string is not closed" },
    { "render --messages D/latin1.json", 1, "latin1%.json: byte 30: invalid UTF%-8" },
    { "render --messages D/late.json", 1, "The system message must come first" },
    { "render --messages D/hi.json --tools D/number.json", 1, "a JSON array of tools" },
    { "serve --host 300.1.1.1 --insecure-bind --port 0", 1, "cannot listen at 300%.1%.1%.1: %w" },
    { "bench --depth 99999999", 1, "context of 100000511 tokens: this model takes" },
    { "bench --probe 1000T", 1, "^moonlet: probe of 1024000.0 GiB: [%d.]+ GiB of memory are av" },
    { "bench /nosuch", 1, "/nosuch/config.json" },
    { "forward --ids 1,999999 --out D/f", 1, "999999 at position 1" },
    { "forward --ids 1 --out /nosuch/f", 1, "/nosuch/f" },
    { "generate --file D/empty", 1, "the prompt is empty" },
    { "generate -p hi --ctx 999999", 1, "this model takes 1 to 4096" },
    { "generate -p 'How are you, my friend?' --ctx 3", 1, "context is full.* room for 3" },
    { "generate --file /nosuch", 1, "/nosuch: No such file" },
    { "generate --chat \xff", 1, "messages%[1%]%.content is not valid UTF%-8 at byte 1" },
    { "eval ppl --file /nosuch", 1, "/nosuch: No such file" },
    { "eval ppl --file /", 1, "/: Is a directory" },
    { "eval ppl --chat /", 1, "/: Is a directory" },
    { "eval ppl --file D/empty", 1, "/empty: fewer than two tokens" },
    { "eval ppl --chat D/empty", 1, "/empty: no assistant says anything in it" },
    { "eval kld --reference /nosuch --file D/empty", 1, "/nosuch/config.json" },
    { "eval kld --reference-logits D/empty", 1, "empty: 0 bytes are too few" },
    { "eval kld --save-logits /nosuch/f --file LICENSE", 1, "/nosuch/f" },
    { "eval report D/object.json --out D/q", 1, "object%.json: not what eval kld %-%-json prints" },
    { "imatrix D/model --text LICENSE -o D/model/model.safetensors", 1, "would be a part of the " },
    { "imatrix D/link --text LICENSE --hessians D/model/h.safetensors", 1, "a part of the check" },
    { "imatrix D/model --text D/hi.json -o D/model/../hi.json", 1, "hi%.json: is read; choose" },
    { "forward D/model --ids 1 --out D/model/config.json", 1, "would be a part of the checkpoint" },
    { "eval kld D/model --file LICENSE --save-logits D/model/x.safetensors", 1, "a part of the" },
    { "eval kld --reference D/model --file LICENSE --report D/model/tokenizer.json", 1, "a part" },
    { "eval kld --reference D/model --file D/hi.json --per-position D/hi.json", 1, "is read" },
    { "eval report D/object.json --out D/object.json", 1, "object%.json: is read; choose" },
    { "eval report /nosuch --out D/q", 1, "/nosuch: No such file" },
    { "eval kld --per-tensor --bits 7 --file LICENSE", 1, "^moonlet: %(affine, 7 bits%): affine " },
    { "eval kld --per-tensor --recipe nosuch --file LICENSE", 1, "no recipe named nosuch" },
    { "eval kld --per-tensor --recipe keep_bf16 --file LICENSE", 1, "nothing is encoded" },
    { "eval kld --reference examples/demo-model --file LICENSE --windows 2 "
      .. "--per-position /nosuch/p.csv", 1, "/nosuch/p%.csv" },
    { "eval ppl --chat D/line5.jsonl", 1, "line5%.jsonl:2: an object with messages expected" },
    { "eval ppl --chat D/line6.jsonl", 1, "line6%.jsonl:1: messages%[0%] is not an object" },
    { "eval ppl --chat D/line7.jsonl", 1, "line7%.jsonl:1: template is not an object" },
    { "eval ppl --chat D/line8.jsonl", 1, "line8%.jsonl:1: tools is not an array" },
    { "eval ppl --chat D/line9.jsonl", 1, "line9%.jsonl:2: byte 1: string is not closed" },
    { "imatrix --text /nosuch -o D/q", 1, "/nosuch: No such file" },
    { "imatrix --text LICENSE -o /nosuch/q", 1, "/nosuch/q" },
    { "imatrix --text LICENSE -o /tmp", 1, "/tmp: Is a directory" },
    { "imatrix --text LICENSE -o D/q --hessians /tmp", 1, "/tmp: Is a directory" },
    { "eval kld --reference /nosuch --file LICENSE --report /nosuch/r", 1, "/nosuch/r" },
    { "eval kld --reference a --file LICENSE --per-position /tmp", 1, "/tmp: Is a directory" },
    { "imatrix --text LICENSE -o D/empty/q", 1, "empty/q.*: Not a directory" },
    { "imatrix --text D/empty -o D/q", 1, "/empty: fewer than two tokens" },
    { "imatrix --chat D/empty -o D/q", 1, "/empty: no assistant says anything in it" },
    { "imatrix spec/golden/models/moe-text/hf --text LICENSE -o D/q", 1, "no tokenizer.json" },
  } do
    it("moonlet " .. row[1], function() check(row) end)
  end

  it("when standard output is full", function()
    for _, command in ipairs { "inspect", "inspect --json", "plan --recipe uniform",
      "tokenize hello", "tokenize --decode 100", "generate -p a -n 2 --temp 0",
      "generate -p a -n 2 --temp 0 --json", "render --messages " .. dir .. "/hi.json" } do
      local _, _, code = os.execute(("%sbin/moonlet %s >/dev/full 2>%s/err"):format(LUA_PATHS,
        command, dir))
      assert.equal(1, code, command)
      assert.equal("moonlet: standard output: No space left on device\n", read(dir .. "/err"))
    end
  end)

  it("when standard input is closed", function()
    local _, _, code = os.execute(LUA_PATHS .. "bin/moonlet tokenize <&- 2>" .. dir .. "/err")
    assert.equal(1, code)
    assert.equal("moonlet: standard input: Bad file descriptor\n", read(dir .. "/err"))
  end)

  -- The signal is sent once the file named has been mapped.
  local INTERRUPT <const> = [[
mkfifo D/pipe; exec 3<>D/pipe
%s bin/moonlet %s <&3 >D/out 2>D/err & pid=$!
for i in {1..500}; do
  grep -q '%s' /proc/$pid/maps && break
  sleep 0.01
done
sleep 0.02; kill -INT $pid
(sleep 20; kill -KILL $pid) 2>&- & watch=$!
wait $pid; code=$?
kill $watch
rm D/pipe; exit $code]]

  for _, row in ipairs {
    { "model.safetensors", "generate --file D/long.txt" }, -- what it generates may end at once
    { "model.safetensors", "generate --file D/long.txt --json" },
    { "model.safetensors", "eval ppl --chat examples/demo-model/eval.jsonl" },
    { "model.safetensors", "eval kld --chat examples/demo-model/eval.jsonl --save-logits D/q" },
    { "model.safetensors", "forward --ids " .. ("5,"):rep(3000) .. " --out D/q" },
    { "model.safetensors", "imatrix --chat examples/demo-model/eval.jsonl -o D/q" },
    { "model.safetensors", "imatrix --chat examples/demo-model/eval.jsonl --hessians D/q" },
    { "model.safetensors", "chat" },
    { "core.so", "tokenize" },
  } do
    local command = row[2]
    it("when interrupted, with nothing left behind: " .. command:sub(1, 40), function()
      write("long.txt", ("The sea. "):rep(1200))
      write("interrupt", INTERRUPT:format(LUA_PATHS, command, row[1]):gsub("D/", dir .. "/"))
      local _, _, code = os.execute("bash " .. dir .. "/interrupt")
      assert.equal("moonlet: interrupted\n", read(dir .. "/err"))
      assert.equal(1, code)
      assert.equal("", read(dir .. "/out"))
      assert.is_nil(io.open(dir .. "/q.partial"))
      assert.is_nil(io.open(dir .. "/q"))
    end)
  end

  it("when a quantizer is interrupted, which can be resumed", function()
    local command = "quantize D/q --recipe unsloth --resume"
    write("interrupt", INTERRUPT:format(LUA_PATHS, command, "model.safetensors"):gsub("D/",
      dir .. "/"))
    local code
    for _ = 1, 10 do -- on a busy machine it may be done before the interrupt comes
      os.execute("rm -rf " .. dir .. "/q")
      code = select(3, os.execute("bash " .. dir .. "/interrupt"))
      if code ~= 0 then break end
    end
    local said = read(dir .. "/err")
    assert.equal(1, code)
    assert.matches("^moonlet: interrupted[^\n]*\n$", said)
    assert.is_nil(io.open(dir .. "/q"))
    assert.equal(said:find("to be resumed") ~= nil, io.open(dir .. "/q.partial") ~= nil)
    assert(os.execute(("%sbin/moonlet %s >%s/out"):format(LUA_PATHS, command:gsub("D/", dir .. "/"),
      dir)))
    assert.is_nil(io.open(dir .. "/q.partial"))
    assert.matches("bits per weight", read(dir .. "/out"))
    local facts = read(dir .. "/q/moonlet.json")
    assert.matches('"command": "moonlet quantize [^"]*/q %-%-recipe unsloth %-%-resume"', facts)
    os.execute("rm -r " .. dir .. "/q")
  end)
end)

describe("a model's broken side files", function()
  local function with_file(name, text)
    local model = dir .. "/model"
    assert(os.execute(("rm -rf %s && mkdir %s && ln -s $PWD/%s/* %s/ && rm -f %s/%s"):format(model,
      model, DEMO, model, model, name)))
    write("model/" .. name, text)
    return model
  end
  for _, row in ipairs {
    { "generation_config.json", "[]", "generation_config%.json: an object is expected" },
    { "generation_config.json", '{"temperature": "hot"}', "temperature: number expected" },
    { "generation_config.json", '{"temperature": -1}', "temperature: %-1 is not in" },
    { "generation_config.json", '{"eos_token_id": "x"}', "eos_token_id: a token id or a list" },
    { "generation_config.json", '{"eos_token_id": [1.5]}', "eos_token_id: a token id or a list" },
    { "tokenizer.json", "", "tokenizer%.json: byte 0" },
    { "chat_template.jinja", "{% for", "chat_template%.jinja:1: unexpected" },
    { "chat_template.jinja", "{{ 1 / 0 }}", "chat_template%.jinja:1: division by zero" },
    { "tokenizer_config.json", "5", "tokenizer_config%.json: " },
    { "model.safetensors", "short", "model%.safetensors: 5 bytes are too few" },
    { "config.json", "[]", "config%.json: .*object is expected" },
  } do
    it(row[1] .. " " .. row[2], function()
      check { "generate " .. with_file(row[1], row[2]) .. " --chat hi -n 2", 1, row[3] }
    end)
  end
end)

describe("success exits with 0", function()
  local function succeeds(arguments)
    local code, out, err = run(arguments)
    assert.equal("", err)
    assert.equal(0, code)
    return out
  end

  for _, command in ipairs { "inspect", "plan", "quantize", "tokenize", "render", "forward",
    "generate", "chat", "bench", "eval", "eval kld", "eval ppl", "eval report" } do
    it(command .. " --help", function()
      assert.matches("^Usage: moonlet " .. command .. " ", succeeds(command .. " --help"))
      assert.matches("\n   " .. command:match("%w+"), succeeds("--help"))
    end)
  end

  it("quantize --help shows both places", function()
    assert.matches("quantize %[DIR%] OUT %-%-recipe", succeeds "quantize --help")
  end)

  it("bench, as text and as JSON", function()
    local few = "bench --prompt 4 --gen 2 --depth 3,0 --rounds 1 --probe 4M --threads 2 "
    local text = succeeds(few .. "--profile")
    local rows = { "prefill", "0", "decode", "0", "prefill", "3", "decode", "3" }
    local seen, tables = {}, 0
    for kind, depth in text:gmatch("\n(%l+) +(%d+) +%d+ ") do
      seen[#seen + 1], seen[#seen + 2] = kind, depth
    end
    assert.same(rows, seen)
    for _ in text:gmatch("\nlm_head ") do tables = tables + 1 end
    assert.equal(4, tables)
    local report = assert(json.decode(succeeds(few .. "--json")))
    for i, row in ipairs(report.rows) do
      assert.same({ rows[2 * i - 1], rows[2 * i] }, { row.kind, tostring(row.depth) })
      assert.is_true(row.tokens_per_second > 0 and row.bytes_per_token > 0)
      assert.is_number(row.bandwidth_share)
    end
    assert.equal(2, report.threads)
    assert.is_true(report.bandwidth_bytes_per_second > 0 and report.open_seconds > 0)
  end)

  it("bench of a model without a tokenizer", function()
    succeeds "bench spec/golden/models/dense-text/hf --prompt 2 --gen 1 --rounds 1 --probe 4M"
  end)

  it("--version", function() assert.matches("^moonlet %d", succeeds "--version") end)

  it("values that begin with a dash", function()
    succeeds "generate -p '- a list' -n 2 --seed -1"
    succeeds "generate --prompt '-1' -n 2 --presence-penalty -0.5"
  end)

  local function keys_of(value)
    local keys = {}
    for key in pairs(value) do keys[#keys + 1] = key end
    table.sort(keys)
    return keys
  end

  local function answer(arguments, keys)
    local value = assert(json.decode(succeeds(arguments .. " --json")))
    table.sort(keys)
    for _, key in ipairs(keys) do assert(value[key] ~= nil, arguments .. ": no " .. key) end
    return value, keys_of(value)
  end

  it("plan --json", function()
    local plan = answer("plan --recipe unsloth --bits 4 --mxfp", { "recipe", "parameters",
      "bits_per_weight", "total_bytes", "tensors", "classes" })
    assert.same({ "bytes", "class", "decision", "name", "shape" }, keys_of(plan.tensors[1]))
    local kinds = {}
    for _, row in ipairs(plan.tensors) do
      kinds[table.concat(keys_of(row.decision), " ")] = true
    end
    assert.same({ ["bits group mode"] = true, keep = true, drop = true }, kinds)
  end)

  it("generate --json", function()
    local expected = { "text", "ids", "finish_reason", "prompt_tokens", "reused_tokens",
      "prefill_seconds", "decode_seconds", "tokens_per_second", "kv", "state_bytes" }
    local value, keys = answer("generate -p 'Once upon' -n 5 --temp 0", expected)
    assert.same(expected, keys)
    assert.same({ "bytes", "codec" }, keys_of(value.kv))
    assert.equal("length", value.finish_reason)
    assert.equal(5, #value.ids)
  end)

  it("eval ppl --json", function()
    local expected = { "nll", "tokens", "perplexity", "words", "word_perplexity" }
    local value, keys = answer("eval ppl --file LICENSE --window 64", expected)
    assert.same(expected, keys)
    assert.is_true(math.abs(math.exp(value.nll / value.tokens) / value.perplexity - 1) < 1e-9)
  end)

  it("eval kld --json, positions in a file, and a report", function()
    local expected = { "mean", "mean_error", "median", "p99", "p999", "max", "top1", "tokens",
      "words", "nll", "reference_nll", "perplexity", "reference_perplexity", "reference", "model",
      "label", "bytes", "bits_per_weight", "histogram", "layers", "matrices" }
    local value, keys = answer("eval kld --reference " .. DEMO .. " --file LICENSE --window 64 "
      .. "--windows 1-2 --per-position D/p.csv --report D/r.html", expected)
    assert.same(expected, keys)
    assert.same({ 0, 1, 126 }, { value.mean, value.top1, value.tokens })
    assert.matches("^<!DOCTYPE html>.*</html>\n$", read(dir .. "/r.html"))
    write("r.json", json.encode(value))
    succeeds "eval report D/r.json D/r.json --out D/r2.html --title 'a <b'"
    assert.matches("<h1>a &lt;b</h1>", read(dir .. "/r2.html"))
    local rows = {}
    for line in io.lines(dir .. "/p.csv") do rows[#rows + 1] = line end
    assert.equal(127, #rows)
    assert.equal("sequence,position,token,kld,nll,reference_nll,top,reference_top", rows[1])
    assert.matches("^2,63,%d+,0,[%d.e-]+,[%d.e-]+,%d+,%d+$", rows[127])
  end)

  it("eval kld --per-tensor --json", function()
    local value = answer("eval kld --per-tensor --mode mxfp4 --by layer --file LICENSE "
      .. "--window 16 --windows 1", { "by", "reference", "rows", "tokens", "totals", "words" })
    assert.matches("/demo%-model$", value.reference)
    assert.same({ "layer", 15, 10, 1 }, { value.by, value.tokens, #value.rows, #value.totals })
    assert.same({ "bytes", "class", "decision", "kld_per_mib", "layer", "max", "mean", "mean_error",
      "median", "name", "nll", "p99", "p999", "parameters", "perplexity", "reference_nll",
      "reference_perplexity", "rule", "saved", "tensors", "tokens", "top1" },
      keys_of(value.rows[2]))
  end)

  it("imatrix --json", function()
    local expected = { "matrices", "tokens", "chunks", "experts", "never_met", "hessians", "notes" }
    local value, keys = answer("imatrix --text LICENSE --chunk 64 --chunks 2 --hessians D/h",
      expected)
    assert.same(expected, keys)
    assert.same({ 103, 128, 2, 41 }, { value.matrices, value.tokens, value.chunks, value.hessians })
  end)

  it("tokenize --json", function()
    local value = answer("tokenize 'Hello, you'", { "ids", "text" })
    assert.equal("Hello, you\n", succeeds("tokenize --decode '"
      .. table.concat(value.ids, ",") .. "'"))
  end)

  it("through a symbolic link, from another directory, in a path with blanks", function()
    local place = dir .. "/a b"
    assert(os.execute(("mkdir '%s' && ln -s $PWD '%s/tree' && ln -s tree/bin/moonlet '%s/m'")
      :format(place, place, place)))
    for _, command in ipairs { "'./m'", "'tree/bin/moonlet'" } do
      local pipe = io.popen(("cd '%s' && %s%s inspect 2>&1"):format(place, LUA_PATHS, command))
      local text = pipe:read("a")
      pipe:close()
      assert.matches("^/[^\n]*/examples/demo%-model\n", text)
      assert.is_nil(text:find("/../", 1, true))
    end
  end)

  it("chat reads a conversation from standard input", function()
    write("talk", "What is the capital of France?\n\n/help\n/reset\nWhat is the capital of Italy?\n"
      .. "/quit\nnever\n")
    os.execute(("%sbin/moonlet chat --temp 0 -n 40 <%s/talk >%s/out 2>%s/err"):format(LUA_PATHS,
      dir, dir, dir))
    assert.equal("", read(dir .. "/err"))
    assert.matches("Paris.*/quit ends\n.*Rome[^\n]*\n$", read(dir .. "/out"))
  end)

  it("chat reads nothing of a conversation twice", function()
    write("talk", "What is the capital of France?\nAnd of Italy?\nAnd of Spain?\n")
    write("count.lua", [[
      local Session = require "moonlet.session"
      local sync = Session.sync
      function Session.sync(self, ids, ...)
        local held = self:ids()
        local n = 0
        while n < #held and held[n + 1] == ids[n + 1] do n = n + 1 end
        local reused, evaluated = sync(self, ids, ...)
        io.stderr:write(n - reused, " ")
        return reused, evaluated
      end]])
    for _, set in ipairs { "enable_thinking=false", "enable_thinking=true" } do
      os.execute(("%sLUA_PATH='lua/?.lua;;' lua5.4 -e 'dofile \"%s/count.lua\"' bin/moonlet chat "
        .. "--temp 0 -n 60 --set %s <%s/talk >%s/out 2>%s/err"):format(LUA_PATHS, dir, set, dir,
        dir, dir))
      assert.equal("0 0 0 ", read(dir .. "/err"))
    end
  end)
end)
