// The line between page and gateway breaks in mid-answer: what the gateway kept of it stays.

import assert from "node:assert/strict";
import { ask, drive, ended, open, set } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await page.addInitScript(() => {
    const whole = window.fetch;
    let broken = false;
    window.fetch = async (path, options) => {
      if (broken || !path.endsWith("/answer")) return whole(path, options);
      broken = true;
      const line = new AbortController();
      const response = await whole(path, { ...options, signal: line.signal });
      const cut = new TransformStream({
        transform(chunk, out) {
          out.enqueue(chunk);
          if (new TextDecoder().decode(chunk).includes('"html"')) {
            line.abort();
            out.error(new TypeError("network error"));
          }
        },
      });
      return new Response(response.body.pipeThrough(cut));
    };
  });
  await open(scene);
  await set(page, { temperature: 0, max_tokens: 100000 });
  await ask(page, "the cat sat on the mat");
  await page.waitForSelector(".assistant.stored");
  assert.match(await page.textContent(".trouble"), /network error/);
  const kept = await page.textContent(".assistant.stored .body");

  await set(page, { max_tokens: 5 });
  await ask(page, "rain");
  await page.waitForFunction(() => document.querySelectorAll(".assistant.stored").length === 2);
  await ended(page);
  assert.equal(await page.textContent(".assistant.stored .body"), kept);
});
