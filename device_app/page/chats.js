// The list of chats: search, open, rename, export, delete.

import { ask, text } from "./api.js";
import { confirmed, lineOf } from "./dialogs.js";
import { announce, byId, icon, make, toast } from "./element.js";

const UNTITLED = "New chat";

/** `open(id)` shows a chat; `gone(id)` is told of one that is no more, `gone(null)` of all. */
export class ChatList {
  constructor({ open, gone, renamed }) {
    this.open = open;
    this.gone = gone;
    this.renamed = renamed;
    this.current = null;
    this.chosen = null; // whose menu is open
    byId("search").addEventListener("input", () => this.search());
    byId("menu-rename").addEventListener("click", () => this.rename(this.close()));
    byId("menu-export").addEventListener("click", () => this.export(this.close()));
    byId("menu-delete").addEventListener("click", () => this.delete(this.close()));
    byId("delete-all").addEventListener("click", () => this.deleteAll());
  }

  search() {
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => this.show(), 120);
  }

  /** Asks for the list and shows it. */
  async show() {
    const wanted = byId("search").value.trim();
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const chats = await ask("GET", `/api/chats?search=${encodeURIComponent(wanted)}`);
    if (turn !== this.turn) return null; // another question was asked since
    const list = byId("chats");
    const focused = document.activeElement?.closest?.("#chats li")?.dataset.id;
    list.replaceChildren();
    let age = null;
    for (const chat of chats) {
      if (ageOf(chat.changed) !== age) {
        age = ageOf(chat.changed);
        list.append(make("li", { className: "when" }, age));
      }
      list.append(this.item(chat));
    }
    byId("no-chats").hidden = chats.length > 0;
    byId("no-chats").textContent = wanted ? "Nothing found." : "No chats yet.";
    if (wanted) announce(`${chats.length} found`);
    if (focused) list.querySelector(`li[data-id="${focused}"] .open`)?.focus();
    return chats;
  }

  item(chat) {
    const title = chat.title || UNTITLED;
    const open = make("button", { type: "button", className: "open", title, onclick: () => this.open(chat.id) }, title);
    const more = make("button", { type: "button", className: "icon-button more", "aria-label": `Options for ${title}` }, icon("more"));
    more.setAttribute("aria-haspopup", "true");
    more.addEventListener("click", () => this.menu(chat, more));
    const item = make("li", { data: { id: chat.id } }, open, more);
    this.mark(item);
    return item;
  }

  /** Shows which chat is open. */
  select(id) {
    this.current = id;
    for (const item of byId("chats").querySelectorAll("li[data-id]")) this.mark(item);
  }

  mark(item) {
    const current = item.dataset.id === this.current;
    item.classList.toggle("current", current);
    const open = item.querySelector(".open");
    if (current) open.setAttribute("aria-current", "page");
    else open.removeAttribute("aria-current");
  }

  menu(chat, from) {
    this.chosen = chat;
    const menu = byId("menu");
    menu.showPopover({ source: from });
    const place = from.getBoundingClientRect();
    menu.style.left = `${Math.min(place.left, innerWidth - menu.offsetWidth - 8)}px`;
    menu.style.top = `${Math.min(place.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
    byId("menu-rename").focus();
  }

  close() {
    byId("menu").hidePopover();
    return this.chosen;
  }

  async rename(chat) {
    const title = await lineOf("Rename this chat", chat.title, "Rename");
    if (title === null) return;
    await ask("PATCH", `/api/chats/${chat.id}`, { title });
    await this.show();
    this.renamed(chat.id, title);
  }

  async export(chat) {
    const file = new Blob([await text(`/api/chats/${chat.id}/export`)], { type: "application/json" });
    const url = URL.createObjectURL(file);
    const name = (chat.title || "chat").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
    make("a", { href: url, download: `${name}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  async delete(chat) {
    if (!(await confirmed("Delete this chat?", `“${chat.title || UNTITLED}” is gone for good then.`, "Delete"))) return;
    await ask("DELETE", `/api/chats/${chat.id}`);
    announce("Deleted");
    this.gone(chat.id);
    await this.show();
    byId("new-chat").focus();
  }

  async deleteAll() {
    if (!(await confirmed("Delete all chats?", "Everything that was said on this device is gone for good then.", "Delete all"))) return;
    await ask("DELETE", "/api/chats");
    toast("All chats are deleted.");
    this.gone(null);
    await this.show();
  }
}

function ageOf(seconds) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight - seconds * 1000) / 86400000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  return days <= 7 ? "The last seven days" : "Earlier";
}
