// The page: what is open, what is asked, and what the gateway says to it.

import { ask, events, onKeyWanted, takeKeyFromAddress } from "./api.js";
import { ChatList } from "./chats.js";
import { askForKey, changedSettings } from "./dialogs.js";
import { announce, byId, make, toast } from "./element.js";
import { closeList, drawers } from "./drawers.js";
import { Images } from "./images.js";
import { HIDDEN, Panel } from "./panel.js";
import { theme } from "./theme.js";
import { Thread } from "./thread.js";

const IDEAS = ["Explain what a permutation is, in two sentences", "Write a haiku about a locked box", "Give me three names for a quiet café"];
const SILENCE = 5000; // milliseconds without news, after which the page says that it waits

takeKeyFromAddress();
window.addEventListener("hashchange", () => takeKeyFromAddress() && location.reload());
onKeyWanted(askForKey);

const panel = new Panel();
const images = new Images();
const thread = new Thread({ regenerate: () => answerAgain(), edit: (keep, text, pictures) => send(text, pictures, keep) });
const list = new ChatList({
  open: (id) => go(id),
  gone: (id) => (id === null || id === chat?.id) && go(null),
  renamed: (id, title) => id === chat?.id && showTitle({ ...chat, title }),
});

let models = [];
let chat = null; // as the gateway has it; null: a new one that nothing was asked in
let settings = {}; // of a chat that is not there yet
let running = null; // the answer that is being made

// What is open

/** Opens a chat by its address. */
function go(id) {
  history.pushState(null, "", id ? `#chat=${id}` : location.pathname);
  return show();
}

/** Shows the chat that the address names. */
async function show() {
  const id = new URLSearchParams(location.hash.slice(1)).get("chat");
  leave();
  panel.forget();
  closeList();
  let messages = [];
  chat = null;
  if (id) {
    try {
      ({ messages, ...chat } = await ask("GET", `/api/chats/${encodeURIComponent(id)}`));
    } catch (error) {
      toast(error.message);
      history.replaceState(null, "", location.pathname);
    }
  }
  thread.show(messages);
  showTitle(chat);
  recall(messages);
  byId("question").focus();
}

function showTitle(shown) {
  chat = shown;
  const model = modelOf();
  byId("title").textContent = chat?.title || "New chat";
  document.title = chat?.title ? `${chat.title} – STIP` : "STIP";
  byId("subtitle").textContent = model ? `${model.name} · ${model.scheme}` : "";
  byId("welcome-text").textContent = model ? `Text stays on this device; the cloud gets vectors ${HIDDEN[model.scheme] ?? "in disguise"}. That is a disguise, not encryption: “What the cloud saw” shows what leaves, and who could read it.` : "";
  images.allow(model?.images ?? false);
  byId("model").hidden = models.length < 2 || chat !== null;
  list.select(chat?.id ?? null);
}

/** The panel's figures of the last answer. */
function recall(messages) {
  const last = messages.at(-1);
  const figures = last?.role === "assistant" ? last.details.figures : null;
  if (figures) panel.recall(messages.at(-2)?.text ?? "", figures, modelOf());
}

function modelOf() {
  return models.find((model) => model.name === (chat?.model ?? byId("model").value)) ?? models[0];
}

// Asking

/** Sends a question, in the place of message `keep` and all that follow it. */
async function send(text, pictures, keep = null) {
  if (running) return;
  if (chat === null) {
    const made = await attempt(() => ask("POST", "/api/chats", { model: modelOf()?.name, settings }));
    if (!made) return;
    history.pushState(null, "", `#chat=${made.id}`);
    showTitle(made);
  }
  thread.dropUnkept();
  const kept = keep ?? thread.count;
  thread.cut(kept);
  thread.question(text, pictures);
  await answer({ text, images: pictures, keep: kept });
}

/** Answers the last question once more. */
async function answerAgain() {
  if (running || chat === null) return;
  const keep = thread.questions;
  thread.cut(keep);
  await answer({ keep });
}

/** Shows an answer as it comes. */
async function answer(question) {
  const run = (running = { chat: chat.id, leaving: new AbortController(), view: null, news: Date.now(), heard: "" });
  const { text, pictures } = thread.lastQuestion();
  thread.offerAgain();
  thread.following = true;
  run.view = thread.answer();
  run.view.begin();
  panel.begin(text, pictures, modelOf());
  showRunning();
  announce("The answer is being made");
  try {
    for await (const event of events(`/api/chats/${run.chat}/answer`, question, run.leaving.signal)) take(event, run);
  } catch (error) {
    if (!run.left && !run.ended) run.view.trouble(error.message || "The connection to the gateway broke off.");
  }
  if (!run.ended) end(run, "", {});
}

function take(event, run) {
  if (run.left) return;
  if (event.kind === "html") run.view.replace(event.start, event.blocks);
  else if (event.kind === "figures") heard(event.figures, run);
  else if (event.kind === "wire") panel.wire(event);
  else if (event.kind === "notice") toast(event.message);
  else if (event.kind === "error") run.view.trouble(event.message);
  else if (event.kind === "done") {
    panel.figures(event.figures);
    end(run, event.text, event);
    announce({ cancelled: "Stopped", error: "The answer broke off" }[event.finish_reason] ?? "The answer is complete");
  }
}

/** Figures as they grow. While they do not, the page says what it waits for. */
function heard(figures, run) {
  panel.figures(figures);
  const state = `${figures.bytes_down} ${figures.tokens}`;
  if (run.heard === "") refreshList();
  if (state !== run.heard) {
    run.heard = state;
    run.news = Date.now();
  }
  const silence = Date.now() - run.news;
  byId("waiting").hidden = silence < SILENCE;
  byId("waiting").textContent = `Nothing from the cloud for ${Math.round(silence / 1000)} s. Still trying; the answer goes on where it was.`;
}

function end(run, text, details) {
  run.ended = true;
  run.view?.end(text, details);
  if (running !== run) return;
  running = null;
  panel.end();
  thread.offerAgain();
  showRunning();
  refreshList();
}

/** Another chat is opened: what was being made ends, and the gateway keeps what there is of it. */
function leave() {
  if (!running) return;
  running.left = true;
  running.leaving.abort();
  running = null;
  showRunning();
}

function showRunning() {
  byId("stop").hidden = running === null;
  byId("send").hidden = running !== null;
  byId("waiting").hidden = true;
  showSendable();
  if (document.activeElement === document.body) byId("question").focus();
}

async function stop() {
  if (running) await attempt(() => ask("POST", `/api/chats/${running.chat}/stop`));
}

/** Gives what `work` gives; says what went wrong otherwise. */
async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    toast(error.message);
    return null;
  }
}

async function refreshList() {
  const chats = await attempt(() => list.show());
  const shown = chats?.find((one) => one.id === chat?.id);
  if (shown && shown.title !== chat.title) showTitle({ ...chat, title: shown.title });
}

// The field

const field = byId("question");

function showSendable() {
  byId("send").disabled = !field.value.trim() && images.urls.length === 0;
}

function fit() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  showSendable();
}

function submit() {
  if (running || byId("send").disabled) return;
  const text = field.value;
  field.value = "";
  const pictures = images.take();
  fit();
  send(text, pictures);
}

field.addEventListener("input", fit);
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
byId("thumbs").addEventListener("change", showSendable);
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("stop").addEventListener("click", stop);
for (const idea of IDEAS) {
  byId("ideas").append(make("button", { type: "button", onclick: () => send(idea, []) }, idea));
}

byId("new-chat").addEventListener("click", () => go(null));
byId("open-settings").addEventListener("click", async () => {
  const changed = await changedSettings(chat?.settings ?? settings);
  if (changed === null) return;
  if (chat === null) settings = changed;
  else {
    const stored = await attempt(() => ask("PATCH", `/api/chats/${chat.id}`, { settings: changed }));
    if (stored) showTitle(stored);
  }
});
byId("model").addEventListener("change", () => showTitle(null));

// The beginning

drawers(() => panel.draw());
theme(() => panel.draw());
fit();
const info = await attempt(() => ask("GET", "/api/info"));
if (info) {
  models = info.models;
  byId("kept").textContent = info.history_kept ? "Chats are kept on this device only." : "Chats are not kept: they end with the gateway.";
  byId("model").replaceChildren(...models.map((model) => make("option", { value: model.name }, model.name)));
  if (models.length === 0) toast("No model that is served here can chat.");
  await refreshList();
  await show();
  byId("app").removeAttribute("aria-busy");
}
window.addEventListener("popstate", () => attempt(show));
