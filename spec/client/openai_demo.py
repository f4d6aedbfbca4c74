"""A question to the demo model through OpenAI's Python SDK (openai_spec.lua)."""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
asked = {"model": "demo-model", "temperature": 0, "messages": [
    {"role": "user", "content": "What is the capital of France?"}]}

whole = client.chat.completions.create(**asked)
streamed = "".join(chunk.choices[0].delta.content or ""
                   for chunk in client.chat.completions.create(**asked, stream=True))
assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens > 3
assert streamed == whole.choices[0].message.content, streamed
print(streamed)
