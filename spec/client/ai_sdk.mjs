// Vercel's AI SDK against scripted answers: node ai_sdk.mjs BASE_URL, from where `ai` is installed.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const from = createRequire(process.cwd() + "/package.json");
const load = (name) => import(from.resolve(name));
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { generateText, isStepCount, streamText, tool } = await load("ai");
const { z } = await load("zod");

const provider = createOpenAICompatible({ name: "moonlet", baseURL: process.argv[2], apiKey: "key",
  includeUsage: true });
const model = provider("demo-model");

const { text, finishReason, usage } = await generateText({ model, prompt: "Hi" });
assert.equal(text, "Hello there.");
assert.equal(finishReason, "stop");
assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0);

const asked = [];
const weather = tool({
  description: "The weather in a city",
  inputSchema: z.object({ city: z.string(), days: z.number() }),
  execute: async (input) => { asked.push(input); return "sunny"; },
});
const stream = streamText({ model, prompt: "What is the weather?", tools: { weather },
  stopWhen: isStepCount(3), onError: ({ error }) => { throw error; } });
const seen = {};
for await (const part of stream.fullStream) {
  seen[part.type] = (seen[part.type] ?? "") + (part.text ?? "");
}
assert.deepEqual(asked, [{ city: "Paris", days: 3 }]);
assert.equal(seen["reasoning-delta"], "I think.Sun.");
assert.equal(seen["text-delta"], "Let me look.It is sunny.");
assert.equal(await stream.finishReason, "stop");
assert.equal((await stream.steps).length, 2);
assert.ok((await stream.usage).outputTokens > 0);

await assert.rejects(generateText({ model, prompt: "Hi", maxRetries: 0 }), /bad weight/);
console.log("ok");
