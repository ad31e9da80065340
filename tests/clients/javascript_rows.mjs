// Rows of the JavaScript packages openai and @huggingface/inference. Prints what rows.py prints.
import OpenAI from "openai";
import { InferenceClient } from "@huggingface/inference";

const [url, wanted = ""] = process.argv.slice(2);
const question = "What is the capital of France?";
const messages = [{ role: "user", content: question }];
const prompt = `<|im_start|>user\n${question}<|im_end|>\n<|im_start|>assistant\n`;
const chat = { model: "pirate", messages, max_tokens: 24, temperature: 0 };
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const endpoint = new InferenceClient("none").endpoint(url);
const schema = {
  type: "object",
  properties: { city: { type: "string", maxLength: 12 } },
  required: ["city"],
  additionalProperties: false,
};
const weather = { type: "function", function: { name: "get_weather", parameters: schema } };

function check(isTrue, what) {
  if (!isTrue) throw new Error(`not so: ${what}`);
}

async function textOf(stream, piece) {
  let text = "";
  for await (const chunk of stream) text += piece(chunk) ?? "";
  return text;
}

const rows = {
  "openai chat": async () => {
    const answer = await client.chat.completions.create(chat);
    check(answer.choices[0].message.content.startsWith("Yo ho ho!"), answer.choices[0].message.content);
  },
  "openai chat stream with usage": async () => {
    const stream = await client.chat.completions.create({
      ...chat, stream: true, stream_options: { include_usage: true },
    });
    let text = "", last;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      last = chunk;
    }
    check(text.startsWith("Yo ho ho!") && last.usage.completion_tokens > 0, text);
  },
  "openai chat n and logprobs": async () => {
    const answer = await client.chat.completions.create({
      ...chat, temperature: 1, seed: 3, n: 2, logprobs: true, top_logprobs: 2,
    });
    check(answer.choices.length === 2 && answer.choices[1].logprobs.content[0].top_logprobs.length === 2, "logprobs");
  },
  "openai chat tools": async () => {
    const answer = await client.chat.completions.create({
      ...chat, model: "tgi", max_tokens: 60, tools: [weather], tool_choice: "required",
    });
    const [call] = answer.choices[0].message.tool_calls;
    check(call.function.name === "get_weather" && "city" in JSON.parse(call.function.arguments), JSON.stringify(call));
  },
  "openai chat json schema": async () => {
    const answer = await client.chat.completions.create({
      ...chat, model: "tgi", max_tokens: 60,
      response_format: { type: "json_schema", json_schema: { name: "city", schema } },
    });
    check("city" in JSON.parse(answer.choices[0].message.content), answer.choices[0].message.content);
  },
  "openai completions of several prompts": async () => {
    const answer = await client.completions.create({ model: "pirate", prompt: [prompt, "The sea"], max_tokens: 20 });
    check(answer.choices.length === 2, "two choices");
  },
  "openai models list and retrieve": async () => {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    for (const name of names) check((await client.models.retrieve(name)).id === name, name);
    check(names[0].includes("/") && names.includes("pirate"), names.join());
  },
  "openai responses": async () => {
    const answer = await client.responses.create({ model: "pirate", input: question, max_output_tokens: 24, temperature: 0 });
    check(answer.output_text.startsWith("Yo ho ho!"), answer.output_text);
  },
  "openai responses stream": async () => {
    const stream = await client.responses.create({
      model: "pirate", input: question, max_output_tokens: 24, temperature: 0, stream: true,
    });
    const text = await textOf(stream, (event) => (event.type === "response.output_text.delta" ? event.delta : ""));
    check(text.startsWith("Yo ho ho!"), text);
  },
  "openai responses stream a call": async () => {
    const { type, function: described } = weather;
    const stream = client.responses.stream({
      model: "tgi", input: question, max_output_tokens: 60, temperature: 0, tools: [{ type, ...described }],
      tool_choice: "required", parallel_tool_calls: false,
    });
    const text = await textOf(stream, (event) => (event.type === "response.function_call_arguments.delta" ? event.delta : ""));
    const [call] = (await stream.finalResponse()).output;
    check(call.name === "get_weather" && call.arguments === text && "city" in JSON.parse(text), text);
  },
  "openai errors show their text": async () => {
    try {
      await client.chat.completions.create({ ...chat, model: "pirat" });
    } catch (error) {
      check(error instanceof OpenAI.NotFoundError && error.message.includes("pirat"), error.message);
      return;
    }
    check(false, "refused");
  },
  "huggingface textGeneration": async () => {
    const answer = await endpoint.textGeneration({ inputs: prompt, parameters: { max_new_tokens: 8 } });
    check(answer.generated_text.length > 0, "a text");
  },
  "huggingface textGenerationStream": async () => {
    const stream = endpoint.textGenerationStream({ inputs: prompt, parameters: { max_new_tokens: 8 } });
    check((await textOf(stream, (chunk) => chunk.token?.text ?? chunk.choices[0].text)).length > 0, "a text");
  },
  "huggingface chatCompletion": async () => {
    const answer = await endpoint.chatCompletion(chat);
    check(answer.choices[0].message.content.startsWith("Yo ho ho!"), answer.choices[0].message.content);
  },
  "huggingface chatCompletionStream": async () => {
    const text = await textOf(endpoint.chatCompletionStream(chat), (chunk) => chunk.choices[0]?.delta?.content);
    check(text.startsWith("Yo ho ho!"), text);
  },
};

for (const [name, run] of Object.entries(rows)) {
  if (!name.includes(wanted)) continue;
  let found = { row: name, ok: true, why: "" };
  try {
    await run();
  } catch (error) {
    found = { row: name, ok: false, why: String(error).slice(0, 600) };
  }
  console.log(JSON.stringify(found));
}
