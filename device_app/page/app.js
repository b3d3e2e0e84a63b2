// The page: what is open, what is asked, and what the gateway says to it.

import { ask, events, onKeyWanted, takeKeyFromAddress } from "./api.js";
import { ChatList } from "./chats.js";
import { askForKey, changedSettings } from "./dialogs.js";
import { announce, byId, make, toast } from "./element.js";
import { closeList, drawers } from "./drawers.js";
import { Field } from "./field.js";
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
const field = new Field(images, { send: (text, pictures) => send(text, pictures), busy: () => busy() });
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
let starting = false; // a question is about to be sent
let loading = true; // a chat is about to be shown
let opened = 0; // times that a chat was opened: a reply for any but the last comes too late
let left = null; // done once the gateway kept what there was of an answer that this page left
let unsettled = null; // an answer after which the page may show another chat than the gateway has

// What is open

/** Opens a chat by its address. */
function go(id) {
  history.pushState(null, "", id ? `#chat=${id}` : location.pathname);
  return show();
}

/** Shows the chat that the address names. */
async function show() {
  const id = new URLSearchParams(location.hash.slice(1)).get("chat");
  const turn = ++opened;
  leave();
  panel.forget();
  closeList();
  let messages = [];
  let found = null;
  chat = unsettled = null;
  loading = true;
  try {
    await left;
    if (id) ({ messages, ...found } = await ask("GET", `/api/chats/${encodeURIComponent(id)}`));
  } catch (error) {
    if (turn === opened) {
      toast(error.message);
      history.replaceState(null, "", location.pathname);
    }
  }
  if (turn !== opened) return; // another chat was opened since
  loading = false;
  thread.show(messages);
  showTitle(found);
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

const busy = () => running !== null || starting || loading;

/** Sends a question, in the place of message `keep` and all that follow it. Says whether it is on its way. */
async function send(text, pictures, keep = null) {
  if (busy() || !(await ready())) return false;
  thread.dropUnkept();
  const kept = keep ?? thread.count;
  const replaces = thread.count > kept;
  thread.cut(kept);
  thread.question(text, pictures);
  answer({ text, images: pictures, keep: kept }, replaces);
  return true;
}

/** Answers the last question once more. */
async function answerAgain() {
  if (busy() || chat === null) return;
  const { text } = thread.lastQuestion();
  if (!(await ready()) || thread.lastQuestion().text !== text) return;
  thread.dropUnkept();
  const keep = thread.questions;
  const replaces = thread.count > keep;
  thread.cut(keep);
  answer({ keep }, replaces);
}

/** Sees to it that there is a chat, and that the page shows what the gateway has of it. Says whether that is so. */
async function ready() {
  const turn = opened;
  starting = true;
  try {
    if (unsettled && !(await settle(unsettled))) return false;
    if (chat === null) {
      const made = await attempt(() => ask("POST", "/api/chats", { model: modelOf()?.name, settings }));
      if (!made || turn !== opened) return false;
      history.pushState(null, "", `#chat=${made.id}`);
      showTitle(made);
    }
    return turn === opened;
  } finally {
    starting = false;
  }
}

/** Shows an answer as it comes. replaces: whether something was said in the place of the question or its answer. */
async function answer(question, replaces) {
  const run = (running = { chat: chat.id, question, replaces, leaving: new AbortController(), view: null, news: Date.now(), heard: "" });
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
    if (!run.ended) throw new Error();
  } catch (error) {
    run.refused = error.status > 0;
    if (!run.left && !run.ended) trouble(run, error.message || "The connection to the gateway broke off.");
  }
  if (!run.ended) end(run, "", {});
  if (unsettled === run && !busy()) await settleNow(run);
}

function trouble(run, message) {
  run.trouble = message;
  run.view.trouble(message);
}

async function settleNow(run) {
  starting = true;
  await settle(run);
  starting = false;
}

/** After an answer that broke off, or has no word though it was to take the place of others: shows the chat as the
 * gateway has it, and gives the question back where it is not in there. Says whether it could. */
async function settle(run) {
  const turn = opened;
  const path = `/api/chats/${run.chat}`;
  const found = await attempt(async () => {
    if (!run.refused) await ask("POST", `${path}/stop`); // done once what there is of the answer is kept
    return ask("GET", path);
  });
  if (!found || turn !== opened) return false;
  unsettled = null;
  thread.show(found.messages);
  if (run.trouble) thread.failed(run.trouble);
  const { text, images: pictures, keep } = run.question;
  const there = found.messages[keep];
  if (text !== undefined && there?.text.trim() !== text.trim()) {
    if (run.replaces && there?.role === "user") thread.editAgain(keep, text);
    else field.giveBack(text, pictures);
  }
  return true;
}

function take(event, run) {
  if (run.left) return;
  if (event.kind === "html") run.view.replace(event.start, event.blocks);
  else if (event.kind === "figures") heard(event.figures, run);
  else if (event.kind === "wire") panel.wire(event);
  else if (event.kind === "notice") toast(event.message);
  else if (event.kind === "error") trouble(run, event.message);
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
  if (!text && (run.replaces || !details.finish_reason)) unsettled = run;
  panel.end();
  thread.offerAgain();
  showRunning();
  refreshList();
}

/** Another chat is opened: what was being made ends, and the gateway keeps what there is of it. */
function leave() {
  if (!running) return;
  const { chat } = running;
  running.left = true;
  running.leaving.abort();
  left = attempt(() => ask("POST", `/api/chats/${chat}/stop`));
  running = null;
  showRunning();
}

function showRunning() {
  byId("stop").hidden = running === null;
  byId("send").hidden = running !== null;
  byId("waiting").hidden = true;
  field.showSendable();
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
