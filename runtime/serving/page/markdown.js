// Markdown of a model, which is a stranger's text. Three layers, each of which is enough by itself:
// HTML in the text is shown as text; what marked makes of the rest passes DOMPurify with a short
// list of elements; the page's Content-Security-Policy runs and loads nothing foreign.

import { el } from "./dom.js";
import { Marked } from "./vendor/marked.esm.js";

const MOST = 200_000; // characters: more is shown as plain text
const SLOW = 300; // milliseconds
const DEEP = /^(?:[ \t]*(?:>|[-*+](?=[ \t])|\d{1,9}[.)](?=[ \t]))){24}|^[ \t]{64,}(?:[-*+>]|\d{1,9}[.)])[ \t]/m;

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
export class Rendering {
  #container;
  #copyButton;
  #blocks = []; // {raw, nodes}
  #plain = false;
  milliseconds = 0; // what the last update took

  constructor(container, copyButton) {
    this.#container = container;
    this.#copyButton = copyButton;
  }

  update(text) {
    if (this.#plain || text.length > MOST || DEEP.test(text)) {
      this.#showPlain(text);
      return;
    }
    const started = performance.now();
    try {
      this.#show(marked.lexer(text));
    } catch {
      this.#showPlain(text); // too deep for the parser's own recursion
      return;
    }
    this.milliseconds = performance.now() - started;
    // A text made to be slow must not stop the page: its rest is not worth the time.
    if (this.milliseconds > SLOW) this.#plain = text.length > 20_000;
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

  #showPlain(text) {
    this.#plain = true;
    this.#blocks = [];
    this.milliseconds = 0;
    this.#container.replaceChildren(el("p", { class: "plain", text }));
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
  for (const line of text.split("\n")) {
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
