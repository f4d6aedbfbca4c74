"""What people do with OpenAI's Python SDK, against a scripted server (openai_spec.lua)."""

import sys

from openai import BadRequestError, OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
messages = [{"role": "user", "content": "Hi"}]
tools = [{"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]

assert [m.id for m in client.models.list()] == ["demo-model"]
assert client.models.retrieve("demo-model").object == "model"

reply = client.chat.completions.create(model="m", messages=messages)
assert reply.choices[0].message.content == "Hello there."
assert reply.choices[0].finish_reason == "stop" and reply.usage.total_tokens > 5

reply = client.chat.completions.create(model="m", messages=messages, tools=tools)
call = reply.choices[0].message.tool_calls[0]
assert call.function.name == "weather" and '"days": 3' in call.function.arguments

with client.chat.completions.stream(model="m", messages=messages, tools=tools,
                                    stream_options={"include_usage": True}) as stream:
    for event in stream:
        pass
    final = stream.get_final_completion()
assert final.choices[0].finish_reason == "tool_calls"
assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
assert final.usage.completion_tokens > 5

text = ""
for chunk in client.chat.completions.create(model="m", messages=messages, stream=True,
                                            logprobs=True, top_logprobs=1):
    text += chunk.choices[0].delta.content or ""
assert text == "Hello there.", text

reply = client.completions.create(model="m", prompt="Once", max_tokens=50, logprobs=1)
assert reply.choices[0].text == "Hello there."
assert "".join(reply.choices[0].logprobs.tokens) == "Hello there."

try:
    client.chat.completions.create(model="m", messages=messages,
                                   response_format={"type": "json_object"})
    raise AssertionError("accepted")
except BadRequestError as e:
    assert e.param == "response_format" and "constrained decoding" in str(e)
print("ok")
