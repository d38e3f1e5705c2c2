// What a screen reader says by itself. An answer is read in whole paragraphs: announcing each token
// would interrupt itself several times a second, and waiting for the end would be minutes of
// silence on a slow machine.

import { byId, el } from "./dom.js";
import { paragraphs } from "./markdown.js";

const KEPT = 15_000; // milliseconds that an announcement stays in the document

export function say(text) {
  const line = el("p", { text });
  byId("speech").append(line);
  setTimeout(() => line.remove(), KEPT);
}

// Says the paragraphs of one answer, each once.
export class Reader {
  #said = 0;

  update(text, complete = false) {
    const ready = paragraphs(text, complete);
    for (const paragraph of ready.slice(this.#said)) say(spoken(paragraph));
    this.#said = Math.max(this.#said, ready.length);
  }
}

// Without the signs of Markdown, which a screen reader would spell out; code can be read in place.
function spoken(paragraph) {
  if (/^ {0,3}(```|~~~)/.test(paragraph)) return "Code block.";
  return paragraph
    .replace(/!?\[([^\]]*)\]\([^)]*\)/g, "$1")
    .replace(/^[ \t]*(?:#{1,6}|>|[-*+])[ \t]+/gm, "")
    .replace(/[*_`|]{1,3}/g, "");
}
