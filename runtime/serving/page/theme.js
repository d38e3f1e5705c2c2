// Not a module: it runs before the page is drawn. Without a choice of the user the system decides,
// by `color-scheme: light dark` in the style sheet.
(() => {
  "use strict";
  const KEY = "llama-onnx.theme";
  const THEMES = ["system", "light", "dark"];
  const ICONS = { system: "#icon-auto", light: "#icon-sun", dark: "#icon-moon" };
  const root = document.documentElement;

  // A browser that blocks storage throws on access; the choice then lasts as long as the page.
  function read() {
    try {
      const stored = localStorage.getItem(KEY);
      return THEMES.includes(stored) ? stored : "system";
    } catch {
      return "system";
    }
  }

  function keep(theme) {
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // see above
    }
  }

  function apply(theme) {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
  }

  let theme = read();
  apply(theme);

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      button.querySelector("span").textContent = `Theme: ${theme}`;
      button.querySelector("use").setAttribute("href", ICONS[theme]);
    };
    show();
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      apply(theme);
      keep(theme);
      show();
    });
  });
})();
