// Questions to the user. Native dialogs: they hold the focus, give it back, and close with Escape.

import { byId, copy } from "./element.js";
import { setKey } from "./api.js";

/** Opens a dialog; gives the value of the button that closed it, "" for Escape. */
function answerOf(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

let keyIsAsked = null;

/** Asks for the gateway's key; many requests may wait for the one answer. */
export function askForKey(wrong) {
  keyIsAsked ??= (async () => {
    const input = byId("key");
    byId("key-title").textContent = wrong ? "That key is not this gateway's" : "The key of this gateway";
    input.value = "";
    do await answerOf(byId("key-dialog"));
    while (!input.value.trim());
    setKey(input.value);
    input.value = "";
    keyIsAsked = null;
  })();
  return keyIsAsked;
}

/** Yes or no. */
export async function confirmed(title, text, yes) {
  byId("ask-field").hidden = true;
  byId("ask-input").required = false;
  return (await asked(title, text, yes, true)) === "yes";
}

/** A line of text, or null. */
export async function lineOf(title, value, yes) {
  const input = byId("ask-input");
  byId("ask-field").hidden = false;
  input.required = true;
  input.value = value;
  const answer = asked(title, "", yes, false);
  input.select();
  return (await answer) === "yes" && input.value.trim() ? input.value.trim() : null;
}

function asked(title, text, yes, dangerous) {
  byId("ask-title").textContent = title;
  byId("ask-text").textContent = text;
  byId("ask-text").hidden = !text;
  byId("ask-yes").textContent = yes;
  byId("ask-yes").classList.toggle("danger", dangerous);
  return answerOf(byId("ask-dialog"));
}

// The Enter key in a text field would press the first button, which is Cancel.
byId("ask-input").addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    event.preventDefault();
    byId("ask-yes").click();
  }
});

/** Shows an address of an answer in full before anything is opened. Only addresses of the web can be. */
export async function showAddress(address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return;
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") return;
  const open = byId("link-open");
  byId("link-url").textContent = url.href;
  open.href = url.href;
  await answerOf(byId("link-dialog"));
  open.removeAttribute("href");
}

byId("link-open").addEventListener("click", () => byId("link-dialog").close());
byId("link-copy").addEventListener("click", async () => {
  if (await copy(byId("link-url").textContent)) byId("link-dialog").close();
});

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

/** The settings as they were changed, or null. */
export async function changedSettings(settings) {
  byId("set-system").value = settings.system ?? "";
  for (const name of NUMBERS) byId(`set-${name}`).value = settings[name] ?? "";
  if ((await answerOf(byId("settings-dialog"))) !== "save") return null;
  const changed = { ...settings, system: byId("set-system").value };
  for (const name of NUMBERS) {
    const { value } = byId(`set-${name}`);
    if (value !== "") changed[name] = Number(value);
    else if (name === "seed") changed.seed = null;
  }
  return changed;
}
