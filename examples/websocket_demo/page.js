import { answer } from "./answer.js";
import { openBundle } from "./bundle.js";
import { Connection, read } from "./stip.js";

const SECRET = { resume: "…", token: "…" }; // not for the screen
const [form, text, frames] = ["form", "#text", "#frames"].map((name) => document.querySelector(name));

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { folder, url, prompt } = form.elements;
  text.textContent = prompt.value;
  frames.replaceChildren();
  let connection;
  try {
    const bundle = await openBundle(new Map([...folder.files].map((file) => [file.name, file])));
    connection = new Connection(url.value, show);
    for await (const piece of answer(bundle, connection, prompt.value)) text.textContent += piece;
  } catch (error) {
    text.textContent = `${error.message}`;
  } finally {
    connection?.close();
  }
});

/** A line for a frame: the way it went, its length, its header, its first values. */
function show(way, frame) {
  const { header, tensors } = read(frame);
  const hidden = JSON.stringify({ ...header, ...Object.fromEntries(Object.entries(SECRET).filter(([name]) => header[name])) });
  const values = tensors.length ? ` ${[...tensors[0].slice(0, 4)].map((value) => value.toFixed(3)).join(" ")} …` : "";
  const line = document.createElement("li");
  line.textContent = `${way === "up" ? "▶" : "◀"} ${frame.byteLength.toLocaleString()} bytes ${hidden}${values}`;
  frames.append(line);
}
