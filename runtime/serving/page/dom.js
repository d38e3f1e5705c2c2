// Small helpers for the document. Texts always go in as text, never as HTML.

export const byId = (id) => document.getElementById(id);

// An element with attributes (`on...`: a listener; `text`: its text) and children.
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function setIcon(element, name) {
  element.querySelector("use").setAttribute("href", `#icon-${name}`);
}

// A textarea as high as its text, up to what the style sheet allows.
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

// The Clipboard API exists only on HTTPS and localhost, but a server may be used over plain HTTP in
// a local network: there the old command still works.
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not allowed: try the old way
    }
  }
  const focused = document.activeElement;
  const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}

// A button that copies what `read` returns, and shows for two seconds that it has.
export function copyButton(label, read, say) {
  const words = el("span", { text: "Copy" });
  const button = el("button", { type: "button", class: "small", "aria-label": label });
  button.append(icon("copy"), words);
  button.addEventListener("click", async () => {
    const copied = await copyText(read());
    setIcon(button, copied ? "check" : "copy");
    words.textContent = copied ? "Copied" : "Not copied";
    say(copied ? "Copied." : "The browser does not allow copying.");
    setTimeout(() => {
      setIcon(button, "copy");
      words.textContent = "Copy";
    }, 2000);
  });
  return button;
}
