// The field that a question is typed in, and its images.

import { byId } from "./element.js";

export class Field {
  /** `send(text, pictures)` gives whether the question is on its way; nothing is sent while `busy()`. */
  constructor(images, { send, busy }) {
    this.images = images;
    this.send = send;
    this.busy = busy;
    this.area = byId("question");
    this.area.addEventListener("input", () => this.fit());
    this.area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.submit();
      }
    });
    byId("thumbs").addEventListener("change", () => this.showSendable());
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.fit();
  }

  showSendable() {
    byId("send").disabled = !this.area.value.trim() && this.images.urls.length === 0;
  }

  fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
    this.showSendable();
  }

  async submit() {
    if (this.busy() || byId("send").disabled) return;
    const text = this.area.value;
    this.area.value = "";
    const pictures = this.images.take();
    this.fit();
    if (!(await this.send(text, pictures))) this.giveBack(text, pictures);
  }

  /** Puts a question that was not sent back, before what was typed since. */
  giveBack(text, pictures) {
    this.area.value = [text, this.area.value].filter(Boolean).join("\n");
    this.images.giveBack(pictures);
    this.fit();
  }
}
