// Connects the page: fields, keys, scrolling, and what the server says about itself.

import { showAbout, showAboutFailed } from "./about.js";
import { say } from "./announce.js";
import { Chat } from "./chat.js";
import { byId, fit, setIcon } from "./dom.js";
import { askForKey } from "./key.js";
import { ServerError, getAbout, getModels } from "./server.js";
import { options, setUpSettings, showModels } from "./settings.js";

const prompt = byId("prompt");
const send = byId("send");
const toEnd = byId("to-end");
const menus = [...document.querySelectorAll("details.menu")];
const narrow = window.matchMedia("(max-width: 64rem)");

// ---- the conversation ---------------------------------------------------------------------------

const chat = new Chat(byId("messages"), { options, onChange: showState, onDrawn: followText });
let following = true; // the newest text stays in view until the user scrolls away from it

function showState() {
  byId("welcome").hidden = !chat.empty;
  send.setAttribute("aria-label", chat.running ? "Stop" : "Send");
  send.classList.toggle("is-stop", chat.running);
  setIcon(send, chat.running ? "stop" : "send");
  followText();
}

function atEnd() {
  const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
  return scrollHeight - clientHeight - scrollTop < 48;
}

function followText() {
  if (following) window.scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
  toEnd.hidden = following || chat.empty;
}

function follow() {
  following = true;
  followText();
}

// Only a person's own scrolling stops or starts the following: the page grows by itself, too.
for (const kind of ["wheel", "touchmove", "keyup", "pointerup"]) {
  window.addEventListener(kind, () => requestAnimationFrame(noticeScroll), { passive: true });
}
window.addEventListener("scrollend", noticeScroll);

function noticeScroll() {
  following = atEnd();
  toEnd.hidden = following || chat.empty;
}

// ---- what the user does -------------------------------------------------------------------------

function submit() {
  const text = prompt.value.trim();
  if (!text || chat.running) return;
  prompt.value = "";
  fit(prompt);
  chat.send(text);
  follow();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (chat.running) chat.stop();
  else submit();
});

prompt.addEventListener("input", () => fit(prompt));
prompt.addEventListener("keydown", (event) => {
  if (event.isComposing) return; // Enter chooses a word of an input method
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !prompt.value) {
    event.preventDefault();
    chat.editLast();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("key-dialog").open) return;
  const open = menus.find((menu) => menu.open && menu.contains(document.activeElement));
  if (open) {
    open.open = false;
    open.querySelector("summary").focus();
  } else {
    chat.stop();
  }
});

byId("new-chat").addEventListener("click", () => {
  chat.clear();
  follow();
  prompt.focus();
});

byId("suggestions").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  prompt.value = button.textContent;
  submit();
  prompt.focus();
});

// theme.js, which listens too, changes the words first.
byId("theme").addEventListener("click", () => setTimeout(() => say(byId("theme").innerText)));

toEnd.addEventListener("click", () => {
  follow();
  prompt.focus();
});

// On a narrow screen the menus cover the conversation: one at a time, and a touch beside it closes.
document.addEventListener("click", (event) => {
  if (!narrow.matches) return;
  for (const menu of menus) if (!menu.contains(event.target)) menu.open = false;
});

// ---- the server ---------------------------------------------------------------------------------

// What a GET returns; asks for the key as often as the server and the user like.
async function withKey(get) {
  for (;;) {
    try {
      return await get();
    } catch (error) {
      if (!(error instanceof ServerError) || error.status !== 401 || !(await askForKey())) throw error;
    }
  }
}

async function showServer() {
  try {
    const about = await withKey(getAbout);
    showAbout(about);
    byId("title").textContent = about.name;
    document.title = `${about.name} · llama-onnx`;
    prompt.placeholder = `Write to ${about.name}`;
    showModels(await withKey(getModels));
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    showAboutFailed(error.message);
  }
}

window.addEventListener("pagehide", () => chat.store());
setUpSettings();
// Where there is room, what no other page has is open from the start.
byId("about").open = !narrow.matches;
chat.restore();
if (!narrow.matches) prompt.focus(); // on a phone the keyboard would cover the page
showServer();
