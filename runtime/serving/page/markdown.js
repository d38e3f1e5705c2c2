// Markdown of a model, which is a stranger's text. Three layers, each of which is enough by itself:
// HTML in the text is shown as text; what marked makes of the rest passes DOMPurify with a short
// list of elements; the page's Content-Security-Policy runs and loads nothing foreign.

import { el } from "./dom.js";
import { Marked } from "./vendor/marked.esm.js";

const MOST = 200_000; // characters: more is shown as plain text
const SLOW = 300; // milliseconds
const FIRST = 1000; // characters that are parsed without a look at the time

const escaped = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (sign) => escaped[sign]);

const marked = new Marked({
  gfm: true,
  renderer: {
    // Models write <br> in cells of tables, where Markdown has no other way.
    html: ({ text }) => (/^<br\s*\/?>$/i.test(text.trim()) ? "<br>" : escape(text)),
    // An image would tell a foreign server what is read here: its text, linked, does not.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || "image")}</a> (image)`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    // Below the headings of the page itself, which has two levels.
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."a b blockquote br code del em h3 h4 h5 h6 hr i li ol p pre strong".split(" "),
    ..."table tbody td th thead tr ul".split(" "),
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, // of every attribute, those excepted:
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

// The HTML of a stranger as nodes that can do nothing but be read and, if links, be followed.
export function clean(html, copyButton) {
  const nodes = DOMPurify.sanitize(html, ALLOWED);
  for (const link of nodes.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) {
      link.replaceWith(...link.childNodes);
      continue;
    }
    link.rel = "noopener noreferrer nofollow";
    link.target = "_blank";
    link.title = link.href; // where it leads, whatever its text says
  }
  const code = new Map([...nodes.querySelectorAll("pre")].map((pre) => [pre, languageOf(pre)]));
  // Nothing of a stranger may look like a part of the page.
  for (const other of nodes.querySelectorAll("[class]")) other.removeAttribute("class");
  for (const [pre, language] of code) frameCode(pre, language, copyButton);
  for (const table of nodes.querySelectorAll("table")) frameTable(table);
  return nodes;
}

const languageOf = (pre) =>
  /^language-([\w+#.-]{1,20})$/.exec(pre.querySelector("code")?.className ?? "")?.[1] ?? "";

function frameCode(pre, language, copyButton) {
  const head = el("div", { class: "code-head" }, el("span", { text: language || "text" }));
  if (copyButton) head.append(copyButton("Copy code", () => pre.textContent.replace(/\n$/, "")));
  const frame = el("div", { class: "code" }, head);
  pre.replaceWith(frame);
  // Reachable by keyboard, because it may have to be scrolled.
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code in ${language}` : "Code");
  frame.append(pre);
}

function frameTable(table) {
  const frame = el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
  table.replaceWith(frame);
  frame.append(table);
}

// Shows a text that grows in `container`. Blocks that are complete keep their elements, so that a
// selection in them, or the focus on a button, survives the next token.
//
// Some texts take the parser a time that grows with the square of their length. A text is parsed
// only if half of it took little; one that takes too long twice is plain text from then on.
export class Rendering {
  #container;
  #copyButton;
  #blocks = []; // {raw, defined, nodes}
  #plain = false;
  #parsed = 0; // the most characters that were parsed
  #late = 0; // how many times in a row that took too long
  milliseconds = 0; // what the last time took

  constructor(container, copyButton) {
    this.#container = container;
    this.#copyButton = copyButton;
  }

  update(text) {
    if (text.length > MOST) this.#plain = true;
    for (let part; !this.#plain && (part = this.#nextPart(text)) < text.length; ) {
      this.#parse(text.slice(0, part));
    }
    const tokens = this.#plain ? null : this.#parse(text);
    try {
      if (tokens) this.#show(tokens);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      this.#plain = true; // too deep again
    }
    if (this.#plain) this.#container.replaceChildren(el("p", { class: "plain", text }));
  }

  // The next characters to try: the same again if they took too long once.
  #nextPart(text) {
    const part = this.#late ? this.#parsed : Math.max(FIRST, 2 * this.#parsed);
    return Math.min(part, text.length);
  }

  // The tokens of `text`, null if it is plain text.
  #parse(text) {
    const started = performance.now();
    let tokens = null;
    try {
      tokens = marked.lexer(text);
    } catch {
      this.#plain = true; // too deep for the parser's own recursion
    }
    this.milliseconds = performance.now() - started;
    this.#parsed = Math.max(this.#parsed, text.length);
    this.#late = this.milliseconds > SLOW ? this.#late + 1 : 0;
    if (this.#late > 1) this.#plain = true;
    return this.#plain ? null : tokens;
  }

  #show(tokens) {
    const { links } = tokens; // definitions anywhere in the text, which any block may use
    const blocks = tokens.filter((token) => token.type !== "space");
    const defined = JSON.stringify(links);
    let same = 0;
    while (same < this.#blocks.length && this.#blocks[same].raw === blocks[same]?.raw) {
      if (this.#blocks[same].defined !== defined) break;
      same += 1;
    }
    for (const { nodes } of this.#blocks.splice(same)) nodes.forEach((node) => node.remove());
    for (const token of blocks.slice(same)) {
      const html = marked.parser(Object.assign([token], { links }));
      const nodes = [...clean(html, this.#copyButton).childNodes];
      this.#container.append(...nodes);
      this.#blocks.push({ raw: token.raw, defined, nodes });
    }
  }
}

// The blocks of a text as words, for a screen reader: paragraphs, and each block of code as one. Of
// a text that is not `complete`, only those that can no longer grow.
export function paragraphs(text, complete) {
  const blocks = [];
  let block = [];
  let fence = null;
  const end = () => {
    if (block.length) blocks.push(block.join("\n"));
    block = [];
  };
  const lines = text.split("\n");
  if (!complete) lines.pop(); // it may grow
  for (const line of lines) {
    const mark = /^ {0,3}(```|~~~)/.exec(line)?.[1];
    if (fence === null && mark) {
      end();
      fence = mark;
      block.push(line);
    } else if (fence !== null) {
      block.push(line);
      if (mark === fence) {
        fence = null;
        end();
      }
    } else if (line.trim()) {
      block.push(line);
    } else {
      end();
    }
  }
  if (complete) end();
  return blocks;
}
