// The corner that says what answers here: which package, how far from its original, and whether
// this machine was shown to compute the certified results.

import { byId, el, setIcon } from "./dom.js";

const GRADES = {
  indistinguishable: "Indistinguishable from the original",
  "very close": "Very close to the original",
  close: "Close to the original",
  "noticeably different": "Noticeably different from the original",
  "another model": "Another model than the original",
};
const STATES = {
  verified: ["verified", "Verified on this machine"],
  failed: ["failed", "Verification failed"],
  "not run": ["unknown", "Not verified on this machine"],
};

export function showAbout(about) {
  const { distance, verified } = about;
  const [state, words] = STATES[verified.state] ?? STATES["not run"];
  byId("about").dataset.state = state;
  setIcon(byId("about").querySelector("summary"), state);
  byId("proof-grade").textContent = GRADES[distance.grade] ?? "Distance from the original unknown";
  byId("proof-state").textContent = words;
  byId("about-panel").replaceChildren(
    el("h2", { text: "This package" }),
    facts(packageFacts(about)),
    el("h2", { text: "Distance from the original" }),
    ...showDistance(distance),
    el("h2", { text: "Verification" }),
    el("p", { class: "verdict", text: verified.sentence }),
  );
}

export function showAboutFailed(sentence) {
  byId("proof-state").textContent = "Not known";
  byId("about-panel").replaceChildren(el("p", { text: sentence }));
}

function packageFacts(about) {
  const { adapters } = about;
  return [
    ["Name", about.name],
    ["Made from", about.source],
    ["Precision", `${about.precision}, ${size(about.bytes)}`],
    ["Runs on", about.provider],
    ["Fallback", about.fallback],
    ["Context", `${about.context_length.toLocaleString("en")} tokens`],
    ["Adapters", adapters.length ? adapters.join(", ") : null],
  ];
}

function showDistance({ grade, grades, figures, sentence }) {
  const words = el("p", { text: sentence });
  if (!figures) return [words];
  const { mean_kl: kl, same_top1: same, perplexity_ratio: ratio } = figures;
  return [
    scale(grade, grades),
    ends(grades),
    facts([
      ["Same likeliest token", `${(100 * same).toFixed(1)} %`],
      ["Mean KL", `${Number(kl.toPrecision(2))} nats`],
      ["Perplexity ratio", ratio.toFixed(3)],
    ]),
    words,
  ];
}

// The grades in order, with ours marked.
function scale(grade, grades) {
  const list = el("ol", { class: "scale", "aria-label": "Grades, from the best to the worst" });
  for (const name of grades) {
    list.append(el("li", { text: name, "aria-current": name === grade ? "true" : null }));
  }
  return list;
}

// What its ends mean, for those who see it: the list has all its words.
function ends(grades) {
  const words = [grades[0], grades.at(-1)].map((text) => el("span", { text }));
  return el("p", { class: "ends", "aria-hidden": "true" }, ...words);
}

function facts(rows) {
  const list = el("dl", { class: "facts" });
  for (const [name, value] of rows) {
    if (value) list.append(el("dt", { text: name }), el("dd", { text: value }));
  }
  return list;
}

function size(bytes) {
  if (bytes < 1e6) return `${Math.ceil(bytes / 1e3)} kB`;
  return bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}
