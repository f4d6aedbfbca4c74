-- What models say: whole turns that begin inside a think block, for tools named "weather".

local client = require "spec.support.client"
local json = require "moonlet.json"
local served = require "spec.support.served"

local said = {}

-- A call as Qwen's models write it.
function said.call(name, arguments)
  local lines = { "<tool_call>", ("<function=%s>"):format(name) }
  for _, key in ipairs(json.keys(arguments)) do
    local value = arguments[key]
    lines[#lines + 1] = ("<parameter=%s>\n%s\n</parameter>"):format(key,
      type(value) == "string" and value or json.encode(value))
  end
  lines[#lines + 1] = "</function>\n</tool_call>"
  return table.concat(lines, "\n")
end

said.CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
  .. "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"

said.TEXTS = {
  ["failure 1: a call inside reasoning that is not closed"] = "I should call.\n" .. said.CALL,
  ["failure 8: typed arguments"] = "</think>\n" .. said.CALL,
  ["failure 9: a list of objects as Python spells it"] = "</think>\n" .. said.call("weather",
    { stops = "[{'name': 'Rome', 'open': True}, {'name': \"L'Aquila\", 'open': None}]" }),
  ["failure 10: text before and between calls"] =
    "x</think>\n\nFirst:\n" .. said.CALL .. "\n" .. said.CALL .. "\nDone.",
  ["failure 11: missing closing tags"] = "</think>\n<tool_call>\n<function=weather>\n"
    .. "<parameter=city>\nRome\n<parameter=days>\n2\n</function>",
  ["failure 20: a call without parameters"] =
    "</think>\n<tool_call>\n<function=weather>\n</function>\n</tool_call>",
  ["failure 24: characters of several tokens"] =
    "Ünïcödé 🙂🙃</think>\n\n日本語 🎉 тест",
  ["failure 18: a Hermes call"] =
    '</think>\n<tool_call>\n{"name": "weather", "arguments": {"city": "A"}}\n</tool_call>',
  ["what only looks like a call"] = "</think>\n\nUse <tool_call> and </think> and <b>bold</b>",
  ["broken off in a tag"] = "</think>\n\nabc <tool_",
  ["nothing"] = "",
  ["only white space"] = " \n\n ",
  ["a call cut off"] = "</think>\n<tool_call>\n<function=weather>\n<parameter=city>\nPar",
}

-- Lets every turn be said in steps of several sizes, with calls held and shown as they grow, to the
-- same request whole and streamed: check(name, replies, grows).
function said.in_all_ways(path, whole, streamed, check)
  for name, text in pairs(said.TEXTS) do
    local answers, requests = {}, {}
    for i, per_step in ipairs { 1, 3, 1000 } do
      for j = 2 * i - 1, 2 * i do
        answers[j] = { text = text, tokens_per_step = per_step }
        requests[j] = { "POST", path, j % 2 == 0 and streamed or whole }
      end
    end
    for _, grows in ipairs { false, true } do
      local server <close> = served.replay(answers, { stream_tool_args = grows })
      check(name, client.all(server, requests), grows)
    end
  end
end

return said
