// The conversation: what was said, what runs now, and what the buttons do to both.

import { say } from "./announce.js";
import { askForKey } from "./key.js";
import { Answer, Question } from "./message.js";
import { Pace } from "./pace.js";
import { ServerError, streamChat } from "./server.js";
import { storedChat } from "./storage.js";

const STOPPED = { kind: "note", text: "You stopped this answer." };
const NO_KEY = { kind: "error", text: "This server answers only with its key. Retry to enter it." };
const CUT = { kind: "note", text: "The answer was cut off: it reached its limit of tokens." };
const LEFT = { kind: "note", text: "This answer ended when the page was left or loaded again." };
const MISTAKE = { kind: "error", text: "This page has a mistake: see the browser's console." };
const EMPTY = { kind: "note", text: "The model ended its answer without a word." };

export class Chat {
  #views = []; // of every message, in order: `Question` or `Answer`
  #running = null; // the AbortController of the answer that is written

  // `options` returns what the settings add to a request; `onChange(running)` follows each change.
  constructor(list, { options, onChange, onDrawn }) {
    this.list = list;
    this.options = options;
    this.onChange = onChange;
    this.onDrawn = onDrawn;
  }

  get empty() {
    return this.#views.length === 0;
  }

  get running() {
    return this.#running !== null;
  }

  restore() {
    const turns = storedChat.read();
    if (!Array.isArray(turns)) return;
    for (const turn of turns) {
      if (typeof turn?.content !== "string") continue;
      if (turn.role !== "user" && typeof turn.stats !== "string") turn.notice = LEFT;
      this.#add(turn);
    }
    this.onChange();
  }

  clear() {
    this.stop();
    this.#running = null; // nobody waits for how it ends
    this.#cut(0);
    this.onChange();
  }

  stop() {
    this.#running?.abort();
  }

  send(text) {
    if (this.running) return;
    this.#add({ role: "user", content: text });
    this.#answer();
  }

  editLast() {
    this.#views.findLast((view) => view instanceof Question)?.startEdit();
  }

  #add(turn) {
    const at = () => this.#views.indexOf(view);
    const view =
      turn.role === "user"
        ? new Question(turn, { onResend: (text) => this.#from(at(), text) })
        : new Answer(turn, { onRetry: () => this.#from(at()), onDrawn: () => this.onDrawn() });
    this.#views.push(view);
    this.list.append(view.element);
    return view;
  }

  // Goes on from a message, with a new `text` instead of it if there is one.
  #from(index, text) {
    this.stop();
    this.#cut(index);
    if (text !== undefined) this.#add({ role: "user", content: text });
    this.#answer();
  }

  #cut(index) {
    for (const view of this.#views.splice(index)) view.remove();
    this.store();
  }

  store() {
    const turns = this.#views.map(({ turn }) => turn);
    storedChat.write(turns.length ? turns : null);
  }

  // The messages before an answer. One that failed before its first word says nothing; the two
  // questions around it become one, because many templates take turns strictly.
  #messages() {
    const { system, ...options } = this.options();
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const { turn } of this.#views) {
      if (!turn.content) continue;
      const last = messages.at(-1);
      if (last?.role === turn.role) last.content += `\n\n${turn.content}`;
      else messages.push({ role: turn.role, content: turn.content });
    }
    return { ...options, messages };
  }

  async #answer() {
    const request = this.#messages();
    const controller = new AbortController();
    this.#running = controller;
    const turn = { role: "assistant", content: "" };
    const view = this.#add(turn);
    view.showWriting();
    this.store();
    this.onChange();
    say("The model is answering.");
    turn.notice = await this.#receive(request, controller.signal, turn, view);
    // A retry, an edit or a new chat may have taken the place of this answer meanwhile.
    if (this.#running !== controller) return;
    this.#running = null;
    view.showDone({ aloud: true });
    this.store();
    this.onChange();
  }

  // Fills `turn` with an answer, and returns what there is to say about how it ended.
  async #receive(request, signal, turn, view) {
    const pace = new Pace();
    let end = null;
    try {
      for await (const { text, finish, usage } of streamChat(request, signal)) {
        if (signal.aborted) break;
        if (text) {
          turn.content += text;
          pace.piece();
          view.grow();
        }
        if (finish) end = finish;
        if (usage) pace.usage(usage);
      }
    } catch (error) {
      return await this.#failed(error, request, signal, turn, view);
    } finally {
      turn.stats ??= pace.toString();
    }
    if (signal.aborted) return STOPPED;
    if (end === "length") return CUT;
    return turn.content ? null : EMPTY;
  }

  async #failed(error, request, signal, turn, view) {
    if (error.name === "AbortError") return STOPPED;
    if (!(error instanceof ServerError)) {
      reportError(error); // to the console, as if nobody had caught it
      return MISTAKE;
    }
    if (error.status !== 401) return { kind: "error", text: error.message };
    return (await askForKey()) && !signal.aborted
      ? this.#receive(request, signal, turn, view)
      : NO_KEY;
  }
}
