// One message on the page: its text, what is known about it, and its buttons.

import { Reader, say } from "./announce.js";
import { copyButton, el, fit, icon } from "./dom.js";
import { Rendering } from "./markdown.js";

const FRAME = 60; // milliseconds between two updates of an answer that is written

const copy = (label, read) => copyButton(label, read, say);

function action(name, label, words, onclick) {
  const button = el("button", { type: "button", class: "small", "aria-label": label, onclick });
  button.append(icon(name), el("span", { text: words }));
  return button;
}

// What a person wrote. `onResend` gets the edited text.
export class Question {
  constructor(turn, { onResend }) {
    this.turn = turn;
    this.body = el("div", { class: "body", dir: "auto", text: turn.content });
    this.edit = action("edit", "Edit this message", "Edit", () => this.startEdit());
    this.actions = el("div", { class: "actions" }, copy("Copy this message", () => turn.content), this.edit);
    this.element = el(
      "article",
      { class: "question", "aria-label": "You" },
      el("h2", { class: "unseen", text: "You" }),
      this.body,
      this.actions,
    );
    this.onResend = onResend;
  }

  remove() {
    this.element.remove();
  }

  startEdit() {
    if (this.form) return;
    const area = el("textarea", { "aria-label": "Edit your message", rows: "1", dir: "auto" });
    area.value = this.turn.content;
    const buttons = el("div", { class: "buttons" });
    buttons.append(el("button", { type: "button", text: "Cancel", onclick: () => this.endEdit() }));
    buttons.append(el("button", { type: "submit", class: "primary", text: "Send" }));
    this.form = el("form", { class: "editing" }, area, buttons);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim()) this.onResend(area.value.trim());
    });
    area.addEventListener("input", () => fit(area));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation(); // it ends the edit, not an answer
        this.endEdit();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.form.requestSubmit();
      }
    });
    this.element.classList.add("is-edited");
    this.element.append(this.form);
    fit(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  endEdit() {
    this.form.remove();
    this.form = null;
    this.element.classList.remove("is-edited");
    this.edit.focus();
  }
}

// What the model wrote, or is writing.
export class Answer {
  #rendering;
  #reader = new Reader();
  #timer = null;
  #drawn = 0;

  constructor(turn, { onRetry, onDrawn }) {
    this.turn = turn;
    this.onDrawn = onDrawn;
    this.body = el("div", { class: "body prose", dir: "auto" });
    this.waiting = el("p", { class: "waiting", text: "Reading …" });
    this.notice = el("p", { class: "notice", hidden: "" });
    this.stats = el("p", { class: "stats" });
    this.actions = el("div", { class: "actions" });
    this.actions.append(
      copy("Copy this answer", () => turn.content),
      action("retry", "Retry this answer", "Retry", onRetry),
      this.stats,
    );
    this.element = el(
      "article",
      { class: "answer", "aria-label": "Answer" },
      el("h2", { class: "unseen", text: "Answer" }),
      this.body,
      this.waiting,
      this.notice,
      this.actions,
    );
    this.#rendering = new Rendering(this.body, copy);
    this.showDone();
  }

  showWriting() {
    this.element.classList.add("is-writing");
    this.element.setAttribute("aria-busy", "true");
    this.waiting.hidden = false;
    this.actions.hidden = true;
  }

  // Draws soon: at most once a frame, and less often where drawing takes long.
  grow() {
    this.waiting.hidden = true;
    if (this.#timer !== null) return;
    const pause = Math.max(FRAME, 4 * this.#rendering.milliseconds);
    const wait = Math.max(0, this.#drawn + pause - performance.now());
    this.#timer = setTimeout(() => {
      this.#timer = null;
      this.#draw();
      this.#reader.update(this.turn.content);
    }, wait);
  }

  // Shows everything; what follows is the end of a live answer, so `aloud`, or a stored one.
  showDone({ aloud = false } = {}) {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#draw();
    this.element.classList.remove("is-writing");
    this.element.removeAttribute("aria-busy");
    this.waiting.hidden = true;
    this.actions.hidden = false;
    this.actions.firstChild.hidden = !this.turn.content;
    const { notice, stats } = this.turn;
    this.notice.hidden = !notice;
    this.notice.textContent = notice?.text ?? "";
    this.notice.classList.toggle("is-error", notice?.kind === "error");
    this.stats.textContent = stats ?? "";
    if (!aloud) return;
    this.#reader.update(this.turn.content, true);
    say(notice ? notice.text : "The answer is complete.");
  }

  remove() {
    clearTimeout(this.#timer);
    this.element.remove();
  }

  #draw() {
    this.#rendering.update(this.turn.content);
    this.#drawn = performance.now();
    this.onDrawn();
  }
}
