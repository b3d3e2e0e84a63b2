// Images that go with a question: dropped, pasted or picked; shown small until they are sent.

import { announce, byId, button, make, toast } from "./element.js";

const MOST = 8;
const MOST_BYTES = 6 * 2 ** 20; // of a file, as it is sent
const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff", "image/avif", "image/jp2"];

export class Images {
  constructor() {
    this.urls = [];
    this.taken = false; // whether the model takes any
    byId("pick-image").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", () => {
      this.add(byId("file").files);
      byId("file").value = "";
    });
    byId("question").addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (files.length === 0) return;
      event.preventDefault();
      this.add(files);
    });
    const box = byId("box");
    // A file that is dropped anywhere must not replace the page.
    for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
    document.addEventListener("dragover", (event) => {
      if (event.dataTransfer?.types.includes("Files")) box.classList.toggle("dropping", this.taken);
    });
    document.addEventListener("dragleave", (event) => event.relatedTarget || box.classList.remove("dropping"));
    document.addEventListener("drop", (event) => {
      box.classList.remove("dropping");
      if (event.dataTransfer?.files.length) this.add(event.dataTransfer.files);
    });
  }

  /** Says whether the chat's model takes images. */
  allow(taken) {
    this.taken = taken;
    byId("pick-image").hidden = !taken;
    if (!taken) this.clear();
  }

  async add(files) {
    if (!this.taken) return toast("This model takes no images.");
    for (const file of files) {
      if (!KINDS.includes(file.type)) toast("That is no image this device can read.");
      else if (file.size > MOST_BYTES) toast("That image is larger than 6 MiB.");
      else if (this.urls.length >= MOST) toast(`At most ${MOST} images go with a question.`);
      else this.urls.push(await dataUrl(file));
    }
    this.show();
  }

  clear() {
    this.urls = [];
    this.show();
  }

  /** Gives the images away, to be sent. */
  take() {
    const urls = this.urls;
    this.clear();
    return urls;
  }

  /** Takes images back that were not sent. */
  giveBack(urls) {
    if (this.taken) this.urls.unshift(...urls);
    this.show();
  }

  show() {
    const thumbs = byId("thumbs");
    thumbs.hidden = this.urls.length === 0;
    thumbs.replaceChildren(
      ...this.urls.map((url, index) => {
        const remove = () => {
          this.urls.splice(index, 1);
          this.show();
          announce("Image removed");
          byId("question").focus();
        };
        const name = `Image ${index + 1}`;
        return make("div", { className: "thumb" }, make("img", { src: url, alt: name }), button("close", "", remove, `Remove ${name}`));
      }),
    );
    thumbs.dispatchEvent(new CustomEvent("change", { bubbles: true }));
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
