// The list of chats and the panel: columns where there is room, drawers over the page where there is not.

import { byId } from "./element.js";

const NARROW = matchMedia("(max-width: 820px)"); // both are drawers
const OVERLAID = matchMedia("(max-width: 1180px)"); // the panel is one
const OPENERS = { sidebar: "open-sidebar", panel: "toggle-panel" };
const REMEMBERED = "stip-panel";

/** Sets them up. `resized` is called when the panel gets another size. */
export function drawers(resized) {
  byId("open-sidebar").addEventListener("click", () => put("sidebar", true));
  byId("close-sidebar").addEventListener("click", closeList);
  byId("toggle-panel").addEventListener("click", () => putPanel(!isOpen("panel")));
  byId("close-panel").addEventListener("click", () => putPanel(false));
  byId("veil").addEventListener("click", () => {
    put("sidebar", false);
    put("panel", false);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open], :popover-open")) return;
    if (NARROW.matches && isOpen("sidebar")) put("sidebar", false);
    else if (OVERLAID.matches && isOpen("panel")) put("panel", false);
  });
  NARROW.addEventListener("change", arrange);
  OVERLAID.addEventListener("change", arrange);
  new ResizeObserver(resized).observe(byId("panel"));
  arrange();
}

/** Closes the list where it is a drawer. */
export function closeList() {
  put("sidebar", false);
}

function arrange() {
  put("sidebar", false);
  put("panel", !OVERLAID.matches && localStorage.getItem(REMEMBERED) !== "closed");
}

function putPanel(open) {
  put("panel", open);
  if (!OVERLAID.matches) localStorage.setItem(REMEMBERED, open ? "open" : "closed");
}

function isOpen(name) {
  return byId("app").classList.contains(`with-${name}`);
}

/** Opens or closes one. Where it lies over the whole page, the rest cannot be reached meanwhile. */
function put(name, open) {
  const was = isOpen(name);
  byId("app").classList.toggle(`with-${name}`, open);
  byId(OPENERS[name]).setAttribute("aria-expanded", open);
  const over = NARROW.matches && (isOpen("sidebar") || isOpen("panel"));
  document.querySelector("main").inert = over;
  byId("sidebar").inert = NARROW.matches && !isOpen("sidebar");
  byId("veil").hidden = !over;
  if (was === open) return;
  const focused = document.activeElement;
  if (open && OVERLAID.matches) byId(`close-${name}`).focus();
  if (!open && (focused === document.body || byId(name).contains(focused))) byId(OPENERS[name]).focus();
}
