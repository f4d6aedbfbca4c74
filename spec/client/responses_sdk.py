"""The Responses API of OpenAI's Python SDK, against a scripted server (responses_spec.lua)."""

import sys

from openai import BadRequestError, OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="key", max_retries=0)
tools = [{"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}}}}]

reply = client.responses.create(model="m", input="Hi", instructions="Be brief.")
assert reply.output_text == "Hello there." and reply.status == "completed"
assert reply.usage.total_tokens > 5 and reply.usage.input_tokens_details.cached_tokens == 0

ask = dict(model="m", tools=tools, reasoning={"effort": "high", "summary": "auto"},
           include=["reasoning.encrypted_content"], store=False)
whole = client.responses.create(input="Hi", **ask)
with client.responses.stream(input="Hi", **ask) as stream:
    events = list(stream)
    final = stream.get_final_response()
for response in whole, final:
    thought, message, call = response.output
    assert thought.summary[0].text == "I think." and thought.encrypted_content
    assert message.content[0].text == "Let me look." == response.output_text
    assert (call.name, call.arguments) == ("weather", '{"city": "Paris", "days": 3}')
assert whole.usage == final.usage
assert [event.sequence_number for event in events] == list(range(len(events)))
deltas = {}
for event in events:
    if event.type.endswith(".delta"):
        deltas[event.type] = deltas.get(event.type, "") + event.delta
assert deltas == {"response.reasoning_summary_text.delta": "I think.",
                  "response.output_text.delta": "Let me look.",
                  "response.function_call_arguments.delta": call.arguments}, deltas

items = [{"role": "user", "content": "Hi"}, *final.output,
         {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}]
reply = client.responses.create(input=items, **ask)
assert reply.output_text == "Hello there."

reply = client.responses.create(model="m", input="Hi", max_output_tokens=1)
assert reply.status == "incomplete" and reply.incomplete_details.reason == "max_output_tokens"

for kind, more in (("text.format", {"text": {"format": {"type": "json_object"}}}),
                   ("previous_response_id", {"previous_response_id": whole.id})):
    try:
        client.responses.create(model="m", input="Hi", **more)
        raise AssertionError("accepted")
    except BadRequestError as e:
        assert e.param == kind, e

last = list(client.responses.create(model="m", input="Hi", stream=True))[-1]
assert last.type == "response.failed" and last.response.error.message == "bad weight", last
print("ok")
