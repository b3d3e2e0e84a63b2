// Elements by name, and their making: text is always set as text.

export const byId = (id) => document.getElementById(id);

/** An element with properties, and children that are elements or text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** One of the symbols at the top of the page. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const drawn = document.createElementNS(space, "svg");
  drawn.setAttribute("class", "icon");
  drawn.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  drawn.append(use);
  return drawn;
}

/** A button with an icon, named by its text or, without text, by `label`. */
export function button(name, text, onclick, label) {
  const made = make("button", { type: "button", onclick }, icon(name), text);
  if (label) {
    made.setAttribute("aria-label", label);
    made.title = label;
  }
  return made;
}

/** Says something to who cannot see the page. */
export function announce(text) {
  byId("status").textContent = text;
}

let hiding;

/** Says something briefly, to everybody. */
export function toast(text) {
  const shown = byId("toast");
  shown.textContent = text;
  shown.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => (shown.hidden = true), 6000);
}

/** Puts text on the clipboard, and says so. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
    return true;
  } catch {
    toast("The browser did not let this page copy.");
    return false;
  }
}
