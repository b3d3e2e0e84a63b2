// Requests to this gateway, with its key. Nothing else is ever asked.

const KEY = "stip-key";

/** Takes the key out of the address (#key=…), so that no history or screenshot holds it; says whether there was one. */
export function takeKeyFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given === null) return false;
  sessionStorage.setItem(KEY, given);
  history.replaceState(null, "", location.pathname);
  return true;
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key.trim());
}

/** An answer that is no success. `status` 0: the gateway cannot be reached. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let askForKey = async () => {};

/** `ask(wrong)` is awaited when the gateway wants a key; then the request is sent again. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

async function send(method, path, body, signal) {
  for (;;) {
    if (!sessionStorage.getItem(KEY)) await askForKey(false);
    const key = sessionStorage.getItem(KEY);
    let response;
    try {
      response = await fetch(path, {
        method,
        signal,
        headers: { Authorization: `Bearer ${key}`, ...(body && { "Content-Type": "application/json" }) },
        body: body && JSON.stringify(body),
        cache: "no-store",
        redirect: "error",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, "The gateway does not answer. Is stip-device serve still running?");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      await askForKey(true);
      continue;
    }
    const said = await response.json().catch(() => ({}));
    throw new Refused(response.status, said.error?.message ?? `The gateway answered ${response.status}.`);
  }
}

/** The JSON of an answer, or null where it has none. */
export async function ask(method, path, body) {
  const response = await send(method, path, body);
  return response.status === 204 ? null : response.json();
}

/** The text of an answer, as it is. */
export async function text(path) {
  return (await send("GET", path)).text();
}

/** Server-sent events of a POST, one object each. */
export async function* events(path, body, signal) {
  const response = await send("POST", path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const one of whole) if (one.startsWith("data: ")) yield JSON.parse(one.slice(6));
  }
}
