"""What people do with Anthropic's Python SDK, against a scripted server (anthropic_spec.lua)."""

import sys

from anthropic import Anthropic, AuthenticationError, BadRequestError

client = Anthropic(base_url=sys.argv[1], api_key="key", max_retries=0)
messages = [{"role": "user", "content": "Hi"}]
tools = [{"name": "weather", "input_schema": {"type": "object", "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}}}}]
ask = dict(model="m", max_tokens=500, messages=messages)

reply = client.messages.create(**ask, system="Be brief.")
assert reply.content[0].text == "Hello there." and reply.stop_reason == "end_turn"
assert reply.usage.input_tokens > 5 and reply.usage.cache_read_input_tokens == 0

count = client.messages.count_tokens(model="m", messages=messages, system="Be brief.")
assert count.input_tokens == reply.usage.input_tokens

whole = client.messages.create(**ask, tools=tools, thinking={"type": "adaptive"})
with client.messages.stream(**ask, tools=tools, thinking={"type": "adaptive"}) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_message()
for message in whole, final:
    thought, text, call = message.content
    assert (thought.type, thought.thinking) == ("thinking", "I think.") and thought.signature
    assert text.text == "Let me look." and message.stop_reason == "tool_use"
    assert (call.name, call.input) == ("weather", {"city": "Paris", "days": 3})
assert whole.usage == final.usage
for kind in "thinking", "signature", "text", "input_json", "content_block_stop", "message_stop":
    assert kind in kinds, kinds

messages += [{"role": "assistant", "content": final.content}, {"role": "user", "content": [
    {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}]}]
with client.messages.stream(**ask, tools=tools) as stream:
    assert "".join(stream.text_stream) == "Hello there."

try:
    client.messages.create(**ask, tools=tools, tool_choice={"type": "any"})
    raise AssertionError("accepted")
except BadRequestError as e:
    assert e.body["error"]["type"] == "invalid_request_error" and "constrained" in str(e)
try:
    Anthropic(base_url=sys.argv[1], api_key="wrong", max_retries=0).messages.create(**ask)
    raise AssertionError("let in")
except AuthenticationError as e:
    assert e.body["error"]["type"] == "authentication_error"
try:
    with client.messages.stream(**ask) as stream:
        stream.get_final_message()
    raise AssertionError("no error")
except Exception as e:
    assert "bad weight" in str(e), repr(e)
print("ok")
