// The server's API key, asked for when the server wants one.

import { byId } from "./dom.js";
import { storedKey } from "./storage.js";

let asking = null; // several requests may fail at once: one question is enough

// Returns whether the user entered a key.
export function askForKey() {
  asking ??= ask().finally(() => {
    asking = null;
  });
  return asking;
}

function ask() {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-text").textContent = storedKey.read()
    ? "The server did not accept the key. Enter the one that it was started with."
    : "Enter the key that the server was started with. It is kept in this tab only.";
  field.value = "";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    const form = byId("key-form");
    const cancel = byId("key-cancel");
    const done = new AbortController();
    const { signal } = done;
    const submit = (event) => {
      event.preventDefault();
      storedKey.write(field.value.trim());
      dialog.close("entered");
    };
    form.addEventListener("submit", submit, { signal });
    cancel.addEventListener("click", () => dialog.close(""), { signal });
    dialog.addEventListener(
      "close",
      () => {
        done.abort();
        field.value = "";
        resolve(dialog.returnValue === "entered");
        dialog.returnValue = "";
      },
      { signal },
    );
  });
}
