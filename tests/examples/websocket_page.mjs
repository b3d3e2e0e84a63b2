// What the page of examples/websocket_demo does, without a browser: node has the same Blob, WebSocket and modules.
// node --experimental-websocket websocket_page.mjs DEMO FOLDER URL PROMPT MOST TEXTS → {text, encoded, frames}

import { openAsBlob } from "node:fs";
import { readdir } from "node:fs/promises";

const [demo, folder, url, prompt, most, texts] = process.argv.slice(2);
const { openBundle } = await import(`${demo}/bundle.js`);
const { Connection } = await import(`${demo}/stip.js`);
const { answer } = await import(`${demo}/answer.js`);

const names = await readdir(folder);
const bundle = await openBundle(new Map(await Promise.all(names.map(async (name) => [name, await openAsBlob(`${folder}/${name}`)]))));
const frames = { up: 0, down: 0 };
const connection = new Connection(url, (way) => frames[way]++);
let text = "";
for await (const piece of answer(bundle, connection, prompt, Number(most))) text += piece;
connection.close();
console.log(JSON.stringify({ text, encoded: JSON.parse(texts).map((one) => bundle.tokenizer.encode(one)), frames }));
