// "What the cloud saw": vectors, what they give away, and the figures of the line.

import { byId } from "./element.js";
import { bytes, median } from "./figures.js";

const MOST_VECTORS = 1024;
const MOST_TRIPS = 160;
/** What each scheme does to a vector. */
export const HIDDEN = { permutation: "in a secret order", rotation: "turned in a secret way" };
const ATTACKS = { "sorted entries": "Read live, by comparing sorted entries.", length: "Read live, by comparing lengths." };

export class Panel {
  constructor() {
    this.model = null;
    this.forget();
  }

  /** Starts anew: another chat, or none. */
  forget() {
    this.vectors = [];
    this.trips = [];
    this.sent = 0;
    this.seen = null;
    byId("panel-body").hidden = true;
    byId("panel-empty").hidden = false;
    byId("live").hidden = true;
  }

  /** A question was sent. `images`: how many with it. */
  begin(text, images, model) {
    this.forget();
    this.model = model;
    this.images = images;
    byId("panel-empty").hidden = true;
    byId("panel-body").hidden = false;
    byId("panel-body").classList.remove("recalled");
    byId("live").hidden = false;
    byId("wrote-card").hidden = false;
    const pictures = images ? `[${images === 1 ? "an image" : `${images} images`}]` : "";
    byId("wrote").textContent = [pictures, text].filter(Boolean).join(" ");
    for (const id of ["values", "sent-note", "read", "read-note", "attack-text", "trips-note"]) byId(id).textContent = "";
    this.limit();
    this.draw();
  }

  /** An answer of the past: its figures are there, its vectors are not. */
  recall(text, figures, model) {
    this.begin(text, 0, model);
    byId("live").hidden = true;
    byId("panel-body").classList.add("recalled");
    byId("sent-note").textContent = `${figures.vectors_up} vectors. They were shown as they left, and not kept.`;
    byId("attack-lead").textContent = "The next answer is attacked here as it is made.";
    this.figures(figures);
  }

  end() {
    byId("live").hidden = true;
    const strip = byId("strip");
    strip.setAttribute("aria-label", `${this.sent} vectors that were sent, one column each`);
  }

  /** The client's own counters. */
  figures(figures) {
    this.last = figures;
    const a_token = figures.tokens ? `${(figures.round_trips / figures.tokens).toFixed(2)} a token` : "";
    const shown = {
      bytes_up: [bytes(figures.bytes_up)],
      bytes_down: [bytes(figures.bytes_down)],
      round_trips: [String(figures.round_trips), a_token],
      tokens: [String(figures.tokens)],
      accepted: [String(figures.accepted ?? 0), `of ${figures.drafted ?? 0} accepted`],
      replays: [String(figures.replays)],
    };
    for (const [name, [value, beside]] of Object.entries(shown)) {
      const element = document.querySelector(`[data-figure="${name}"]`);
      const small = document.createElement("small");
      small.textContent = beside ?? "";
      element.replaceChildren(value, small);
      element.dataset.value = figures[name] ?? 0;
    }
  }

  /** What travelled since the last time. */
  wire(seen) {
    this.seen = seen;
    this.sent += seen.vectors.length;
    this.vectors = [...this.vectors, ...seen.vectors.map(unpacked)].slice(-MOST_VECTORS);
    this.trips = [...this.trips, ...seen.round_trips].slice(-MOST_TRIPS);
    if (seen.last.length) byId("values").textContent = seen.last.map(signed).join(" ") + " …";
    const read = byId("read");
    read.textContent = seen.read;
    read.scrollTop = read.scrollHeight;
    const width = this.model?.width ?? 0;
    const hidden = HIDDEN[this.model?.scheme] ?? "in disguise";
    byId("sent-note").textContent = `Each token: ${width} numbers, ${hidden}.${this.images ? " Images go as patches, hidden alike; the attack below leaves them out." : ""}`;
    byId("read-note").textContent =
      this.model?.head === "device"
        ? "Nothing: it returns hidden states, and this device makes words of them."
        : "";
    this.limit();
    this.draw();
  }

  /** What an attacker reads who has the model's table: as honest as it can be said. */
  limit() {
    const { positions = 0, found = {}, text = "" } = this.seen ?? {};
    const [attack, count] = Object.entries(found).sort((a, b) => b[1] - a[1])[0] ?? ["", 0];
    const lead = byId("attack-lead");
    const quote = byId("attack-text");
    quote.hidden = !count;
    byId("share").hidden = !positions;
    byId("share-bar").style.width = positions ? `${(100 * count) / positions}%` : "0";
    const question = byId("wrote").textContent;
    const from = question ? text.lastIndexOf(question) : -1;
    quote.textContent = from < 0 ? text : text.slice(from);
    if (count) {
      const all = count === positions ? `all ${positions}` : `${count} of ${positions}`;
      lead.textContent = `Who has the model’s embedding table reads ${all} tokens:`;
    } else if (positions) {
      lead.textContent = "The two quickest look-ups in the embedding table name nothing here. Slower known attacks do.";
    } else {
      lead.textContent = "An attack with the model’s embedding table runs here, on what is sent.";
    }
    const limit = this.model?.limit ?? "";
    byId("limit").textContent = [count ? ATTACKS[attack] : "", limit && `${limit[0].toUpperCase()}${limit.slice(1)}.`].join(" ");
  }

  /** Draws both pictures, in the colours that the style sheet gives them. */
  draw() {
    if (byId("panel-body").hidden) return;
    this.drawStrip(byId("strip"));
    this.drawTrips(byId("trips"));
    if (this.trips.length) {
      const total = median(this.trips.map(([whole]) => whole));
      const cloud = median(this.trips.map(([, part]) => part));
      byId("trips-note").textContent = `A round trip: ${total.toFixed(0)} ms, ${cloud.toFixed(0)} ms in the cloud.`;
    }
  }

  drawStrip(canvas) {
    const [context, width, height] = sized(canvas);
    if (!width || !this.vectors.length) return;
    const column = Math.max(2, Math.min(7, Math.floor(width / this.vectors.length)));
    const shown = this.vectors.slice(-Math.floor(width / column));
    const style = getComputedStyle(canvas);
    const row = height / shown[0].length;
    for (const [sign, colour] of [[1, style.color], [-1, style.caretColor]]) {
      context.fillStyle = colour;
      shown.forEach((vector, at) => {
        vector.forEach((value, feature) => {
          if (value * sign <= 0) return;
          context.globalAlpha = Math.min(1, Math.abs(value) / 56);
          context.fillRect(at * column, feature * row, column - (column > 3 ? 0.6 : 0), row - (row > 2.5 ? 0.5 : 0));
        });
      });
    }
    context.globalAlpha = 1;
  }

  drawTrips(canvas) {
    const [context, width, height] = sized(canvas);
    if (!width || !this.trips.length) return;
    const most = Math.max(...this.trips.map(([total]) => total), 1);
    const column = Math.max(2, Math.min(8, width / this.trips.length));
    const shown = this.trips.slice(-Math.floor(width / column));
    const style = getComputedStyle(canvas);
    shown.forEach(([total, cloud], at) => {
      for (const [value, colour] of [[total, style.caretColor], [cloud, style.color]]) {
        context.fillStyle = colour;
        const tall = Math.max(1, (height * value) / most);
        context.fillRect(at * column, height - tall, column - 1, tall);
      }
    });
  }
}

/** A canvas with as many pixels as the screen has for it. */
function sized(canvas) {
  const scale = devicePixelRatio || 1;
  const { clientWidth, clientHeight } = canvas;
  canvas.width = Math.round(clientWidth * scale);
  canvas.height = Math.round(clientHeight * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return [context, clientWidth, clientHeight];
}

/** Base64 of signed bytes. */
function unpacked(packed) {
  return Int8Array.from(atob(packed), (character) => character.charCodeAt(0));
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
}
