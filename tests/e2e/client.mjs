// OpenAI's own client for JavaScript: node client.mjs URL MODEL. Prints what it got, as JSON.
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none" });
const messages = [{ role: "user", content: "Name the capital of France." }];
const ask = { model, messages, max_tokens: 30 };

const whole = (await client.chat.completions.create(ask)).choices[0].message.content;
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  streamed += chunk.choices[0].delta.content ?? "";
}
const cut = (await client.chat.completions.create({ ...ask, stop: "Paris" })).choices[0].message
  .content;

const schema = {
  type: "object",
  properties: {
    name: { type: "string", maxLength: 30 },
    age: { type: "integer", minimum: 0, maximum: 120 },
  },
  required: ["name", "age"],
  additionalProperties: false,
};
const person = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "Invent a person." }],
  max_tokens: 80,
  response_format: { type: "json_schema", json_schema: { name: "person", schema } },
});

const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
const called = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is the weather in Rome?" }],
  max_tokens: 60,
  tools: [{ type: "function", function: { name: "get_weather", parameters } }],
  tool_choice: "required",
});

const logprobs = await client.chat.completions.create({
  ...ask,
  max_tokens: 3,
  logprobs: true,
  top_logprobs: 2,
});
const unknown = await client.chat.completions
  .create({ ...ask, model: "other" })
  .catch((error) => error.status);
const response = await client.responses.create({ model, input: messages[0].content });

console.log(
  JSON.stringify({
    whole,
    streamed,
    cut,
    person: person.choices[0].message.content,
    call: called.choices[0].message.tool_calls[0].function.arguments,
    logprobs: logprobs.choices[0].logprobs.content.length,
    unknown,
    response: response.output_text,
  }),
);
