// Greedy answers by transformers.js: tokens of prompt and answer, and text. As generate.mjs
// beside a bundle's node.mjs it runs in Node: node generate.mjs SETTINGS DEVICE
import { env, pipeline } from "@huggingface/transformers";

export async function generate({ path, questions, count }, device) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = path;
  const { tokenizer, model } = await pipeline("text-generation", "model", { device });
  const found = [];
  for (const question of questions) {
    const messages = [{ role: "user", content: question }];
    const options = { add_generation_prompt: true, return_dict: true };
    const inputs = tokenizer.apply_chat_template(messages, options);
    const made = await model.generate({ ...inputs, max_new_tokens: count, do_sample: false });
    const prompt = inputs.input_ids.tolist()[0].map(Number);
    const answer = made.tolist()[0].map(Number).slice(prompt.length);
    const text = tokenizer.decode(answer, { skip_special_tokens: true });
    found.push({ prompt, answer, text });
  }
  return found;
}

if (globalThis.process?.argv) {
  const [settings, device] = process.argv.slice(2);
  console.log(JSON.stringify(await generate(JSON.parse(settings), device)));
}
