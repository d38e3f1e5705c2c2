import { fileURLToPath } from "node:url";
import { env, pipeline, TextStreamer } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = fileURLToPath(new URL(".", import.meta.url));
const chat = await pipeline("text-generation", "model", { device: "cpu" });
const messages = [{ role: "user", content: process.argv[2] ?? "Name the capital of France." }];
const streamer = new TextStreamer(chat.tokenizer, { skip_prompt: true, skip_special_tokens: true });
await chat(messages, { max_new_tokens: 64, do_sample: false, streamer });
