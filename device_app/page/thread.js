// The conversation: questions as text, answers as the HTML that the gateway made safe.

import { byId, button, copy, make } from "./element.js";
import { showAddress } from "./dialogs.js";
import { brief } from "./figures.js";

const NEAR = 80; // pixels from the end at which the page follows an answer

export class Thread {
  constructor({ regenerate, edit }) {
    this.regenerate = regenerate;
    this.edit = edit;
    this.messages = byId("messages");
    this.view = byId("thread");
    this.following = true;
    this.view.addEventListener("scroll", () => {
      this.following = this.view.scrollHeight - this.view.scrollTop - this.view.clientHeight < NEAR;
    });
    new ResizeObserver(() => this.follow()).observe(this.view);
    this.messages.addEventListener("click", (event) => this.clicked(event.target));
  }

  /** Buttons within answers. */
  async clicked(target) {
    const address = target.closest?.("button.address");
    if (address) return showAddress(address.dataset.url);
    const copying = target.closest?.("button.copy");
    if (copying && (await copy(copying.closest(".code").querySelector("code").textContent))) {
      copying.textContent = "Copied";
      setTimeout(() => (copying.textContent = "Copy"), 1500);
    }
  }

  get count() {
    return this.messages.children.length;
  }

  /** Shows the messages of a chat. */
  show(messages) {
    this.messages.replaceChildren();
    this.following = true;
    for (const message of messages) {
      if (message.role === "user") this.question(message.text, message.images);
      else {
        const answer = this.answer();
        answer.replace(0, message.blocks);
        answer.end(message.text, message.details);
      }
    }
    this.offerAgain();
    this.welcome();
    this.follow();
  }

  /** Leaves the first `keep` messages. */
  cut(keep) {
    while (this.count > keep) this.messages.lastElementChild.remove();
  }

  /** Takes away what the gateway did not keep: answers that failed before their first word. */
  dropUnkept() {
    for (const answer of this.messages.querySelectorAll(".assistant:not(.stored)")) answer.remove();
  }

  /** How many messages there are up to the last question. */
  get questions() {
    return [...this.messages.children].findLastIndex((message) => message.matches(".user")) + 1;
  }

  lastQuestion() {
    const last = this.messages.children[this.questions - 1];
    return { text: last?.querySelector(".bubble")?.textContent ?? "", pictures: last?.querySelectorAll("img").length ?? 0 };
  }

  /** The greeting, as long as nothing was said. */
  welcome() {
    byId("welcome").hidden = this.count > 0;
  }

  question(text, images) {
    const message = make("article", { className: "message user", "aria-label": "Your question" });
    const shown = [];
    if (images.length) {
      const pictures = images.map((url, index) => make("img", { src: url, alt: `Image ${index + 1} of the question` }));
      shown.push(make("div", { className: "pictures" }, ...pictures));
    }
    if (text) shown.push(make("div", { className: "bubble" }, text));
    const actions = make(
      "div",
      { className: "actions" },
      button("edit", "", () => this.editing(message, text, images), "Edit this question"),
      button("copy", "", () => copy(text), "Copy this question"),
    );
    message.append(...shown, actions);
    this.messages.append(message);
    this.welcome();
    return message;
  }

  /** Offers a question for changing, with `text` as it was changed already. */
  editAgain(number, text) {
    const message = this.messages.children[number];
    message.querySelector('[aria-label="Edit this question"]').click();
    message.querySelector("textarea").value = text;
  }

  /** Turns a question into a field. */
  editing(message, text, images) {
    const before = [...message.childNodes];
    const field = make("textarea", { value: text, "aria-label": "The question, to be changed" });
    const restore = () => {
      message.replaceChildren(...before);
      message.querySelector(".actions button").focus();
    };
    const send = () => {
      const keep = [...this.messages.children].indexOf(message);
      if (field.value.trim() || images.length) this.edit(keep, field.value, images);
    };
    const buttons = make(
      "div",
      { className: "buttons" },
      make("button", { type: "button", onclick: restore }, "Cancel"),
      make("button", { type: "submit", className: "primary" }, "Ask again"),
    );
    const form = make("form", { "aria-label": "Edit the question" }, field, buttons);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") restore();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    message.replaceChildren(form);
    field.focus();
  }

  /** A new answer at the end, to be filled. */
  answer() {
    const answer = new AnswerView(this);
    this.messages.append(answer.element);
    this.welcome();
    return answer;
  }

  /** Says at the end what went wrong with an answer. */
  failed(message) {
    const answer = this.answer();
    answer.trouble(message);
    answer.end("", { finish_reason: "error" });
    this.offerAgain();
  }

  /** Only the last answer can be made again. */
  offerAgain() {
    for (const again of this.messages.querySelectorAll(".again")) again.remove();
    const last = this.messages.lastElementChild;
    if (!last) return;
    const again = button("again", last.matches(".assistant") ? "Regenerate" : "Answer", () => this.regenerate());
    again.classList.add("again");
    last.querySelector(".actions")?.prepend(again);
  }

  follow() {
    if (this.following) this.view.scrollTop = this.view.scrollHeight;
  }
}

class AnswerView {
  constructor(thread) {
    this.thread = thread;
    this.body = make("div", { className: "body" });
    this.actions = make("div", { className: "actions" });
    this.element = make("article", { className: "message assistant", "aria-label": "Answer" }, this.body, this.actions);
    this.blocks = [];
  }

  /** Shows that the answer is on its way. Readers are told of it once it is whole. */
  begin() {
    this.element.setAttribute("aria-busy", "true");
    this.body.append(make("span", { className: "dots", "aria-hidden": "true" }, make("i"), make("i"), make("i")));
    this.thread.follow();
  }

  /** Replaces the blocks from `start` on. Their HTML was made by the gateway's renderer, from Markdown. */
  replace(start, blocks) {
    this.body.querySelector(":scope > .dots")?.remove();
    for (const block of this.blocks.splice(start)) block.remove();
    for (const html of blocks) {
      const block = make("div");
      block.innerHTML = html;
      this.blocks.push(block);
      this.body.append(block);
    }
    this.thread.follow();
  }

  trouble(message) {
    this.body.querySelector(":scope > .dots")?.remove();
    this.body.append(make("p", { className: "trouble", role: "alert" }, message));
    this.thread.follow();
  }

  end(text, details) {
    this.element.removeAttribute("aria-busy");
    this.body.querySelector(":scope > .dots")?.remove();
    const ending = { cancelled: "Stopped", length: "Cut at the most tokens", error: "Broken off" }[details.finish_reason];
    this.element.classList.toggle("stored", Boolean(text));
    this.actions.replaceChildren();
    const dropped = details.figures?.dropped_turns;
    if (dropped) {
      const what = dropped === 1 ? "the oldest turn was" : `the oldest ${dropped} turns were`;
      this.actions.before(make("p", { className: "left-out" }, `The context is full: ${what} left out.`));
    }
    if (text) this.actions.append(button("copy", "Copy", () => copy(text)));
    const said = [ending, details.figures && text && brief(details.figures)].filter(Boolean).join(" · ");
    if (said) this.actions.append(make("span", { className: "brief" }, said));
    this.thread.follow();
  }
}
