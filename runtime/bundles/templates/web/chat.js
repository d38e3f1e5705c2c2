import { env, pipeline, TextStreamer } from "@huggingface/transformers";

const find = (id) => document.getElementById(id);
const status = find("status");

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL(".", document.baseURI).pathname; // a whole URL finds no tokenizer
env.backends.onnx.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", document.baseURI)
  .href;

const messages = [];

function show(role, text) {
  const line = document.createElement("p");
  line.className = role;
  line.textContent = text;
  find("log").append(line);
  return line;
}

async function answer(chat, text) {
  messages.push({ role: "user", content: text });
  show("user", text);
  const line = show("assistant", "");
  const streamer = new TextStreamer(chat.tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (piece) => (line.textContent += piece),
  });
  const [made] = await chat(messages, { max_new_tokens: 256, do_sample: false, streamer });
  messages.push(made.generated_text.at(-1));
}

try {
  const chat = await pipeline("text-generation", "model", { device: "wasm" });
  status.textContent = "Ready.";
  find("send").disabled = false;
  find("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = find("text").value;
    find("text").value = "";
    find("send").disabled = true;
    status.textContent = "Answering …";
    try {
      await answer(chat, text);
      status.textContent = "Ready.";
    } catch (error) {
      messages.pop();
      status.textContent = `No answer: ${error.message ?? error}`;
    }
    find("send").disabled = false;
    find("text").focus();
  });
} catch (error) {
  status.textContent = `The model cannot be loaded: ${error.message ?? error}`;
}
