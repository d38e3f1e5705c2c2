// The server: its three addresses, and its errors as sentences. Addresses are relative, so that the
// page also works below a path of a reverse proxy.

import { events } from "./sse.js";
import { storedKey } from "./storage.js";

// What the page shows instead of an answer. `status` is HTTP's, 0 where there was no response.
export class ServerError extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

const UNREACHABLE =
  "The server cannot be reached. Start `llama-onnx serve` again, or check the connection.";
const BROKEN =
  "The connection to the server broke in the middle of the answer. What arrived is kept.";

async function send(path, options = {}) {
  const headers = { ...options.headers };
  const key = storedKey.read();
  if (typeof key === "string") headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(UNREACHABLE);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

// What the server said about itself in JSON: OpenAI's {"error": {"message", "code"}}, or
// {"error": "..."} of the layer that bounds requests.
async function failure(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // a proxy's HTML, or nothing
  }
  const said = typeof error === "string" ? error : error?.message;
  return new ServerError(sentence(response, sentenceOf(said), error?.code), response.status);
}

function sentence(response, said, code) {
  const { status } = response;
  if (status === 401) return "The server did not accept the key.";
  if (status === 429 || status === 503) {
    // The sentence may end with the advice that the header gives more exactly.
    const why = said.replace(/[:;,]? *try again[^.]*\.$/i, ".");
    return `${why || "The server is busy."} ${again(response)}`;
  }
  if (code === "context_length_exceeded") {
    return `This conversation no longer fits the model's context. ${said} Start a new chat, or edit an earlier message.`;
  }
  if (status === 413) return `${said || "This message is too long for the server."} Shorten it.`;
  if (said) return said;
  return status >= 500
    ? `The server failed (status ${status}): see its log.`
    : `The server refused the request (status ${status}).`;
}

// Retry-After has seconds, or a date.
function again(response) {
  const value = response.headers.get("retry-after");
  const seconds = /^\d+$/.test(value ?? "") ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  if (!(seconds > 0)) return "Try again in a moment.";
  const whole = Math.ceil(seconds);
  return `Try again in ${whole} ${whole === 1 ? "second" : "seconds"}.`;
}

// Our errors begin in lower case, for a terminal.
function sentenceOf(said) {
  if (typeof said !== "string" || !said.trim()) return "";
  const text = said.trim();
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

export async function getModels() {
  const { data } = await (await send("v1/models")).json();
  return Array.isArray(data) ? data.map((model) => String(model.id)) : [];
}

export async function getAbout() {
  return (await send("about")).json();
}

// Yields {text}, {finish}, {usage} of an answer as they come. Raises `ServerError`, and an
// AbortError after `signal`.
export async function* streamChat(request, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let complete = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = parse(data);
      if (chunk.error) throw new ServerError(sentenceOf(chunk.error.message ?? chunk.error) || BROKEN);
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) {
        complete = true;
        yield { finish: choice.finish_reason };
      }
      if (chunk.usage) yield { usage: chunk.usage };
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError(BROKEN);
  }
  // A stream that just ends looks like one that is complete, but has no reason to finish.
  if (!complete) throw new ServerError(BROKEN);
}

function parse(data) {
  try {
    return JSON.parse(data) ?? {};
  } catch {
    throw new ServerError("The server sent something that is not JSON.");
  }
}
