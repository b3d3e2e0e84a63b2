// Light, dark, or as the system has it.

import { byId } from "./element.js";

const NAMES = { system: "System", light: "Light", dark: "Dark" };
const ORDER = Object.keys(NAMES);

/** Calls `changed` whenever the colours do. */
export function theme(changed) {
  let current = localStorage.getItem("stip-theme") ?? "system";
  const show = () => {
    if (current === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = current;
    byId("theme-name").textContent = NAMES[current];
    byId("theme").setAttribute("aria-label", `Colours: ${NAMES[current]}`);
    changed();
  };
  byId("theme").addEventListener("click", () => {
    current = ORDER[(ORDER.indexOf(current) + 1) % ORDER.length];
    localStorage.setItem("stip-theme", current);
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  show();
}
