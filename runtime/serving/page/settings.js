// The system prompt, the options of sampling and the model, kept for the next visit.

import { byId, el } from "./dom.js";
import { storedSettings } from "./storage.js";

const FIELDS = ["system", "temperature", "max-tokens"];

// A number in a field, undefined if it is empty or not what the field takes.
function number(id) {
  const field = byId(id);
  return field.value !== "" && field.validity.valid ? field.valueAsNumber : undefined;
}

export function setUpSettings() {
  const stored = storedSettings.read() ?? {};
  for (const id of FIELDS) {
    const field = byId(id);
    if (typeof stored[id] === "string") field.value = stored[id];
    showValidity(field);
    field.addEventListener("input", () => {
      showValidity(field);
      storedSettings.write(Object.fromEntries(FIELDS.map((name) => [name, byId(name).value])));
    });
  }
}

// A value that is not used says so, where the help of the field is.
function showValidity(field) {
  const help = byId(`${field.id}-help`);
  if (!help) return;
  help.dataset.text ??= help.textContent;
  const { valid } = field.validity;
  field.setAttribute("aria-invalid", String(!valid));
  help.textContent = valid ? help.dataset.text : `Not used. ${field.validationMessage}`;
  help.classList.toggle("is-error", !valid);
}

// Adapters are models too: with several, the user chooses.
export function showModels(names) {
  byId("model").replaceChildren(...names.map((name) => el("option", { value: name, text: name })));
  byId("model-field").hidden = names.length < 2;
}

// What the settings add to a request. What is empty is left to the server and the package.
export function options() {
  return {
    model: byId("model").value || undefined,
    system: byId("system").value.trim(),
    temperature: number("temperature"),
    max_completion_tokens: number("max-tokens"),
  };
}
