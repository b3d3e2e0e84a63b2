// An image is dropped on the page and goes with a question.

import assert from "node:assert/strict";
import { ask, drive, ended, open, set } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene);
  await set(page, { temperature: 0, max_tokens: 5 });
  await page.evaluate(async (png) => {
    const bytes = Uint8Array.from(atob(png), (character) => character.charCodeAt(0));
    const dropped = new DataTransfer();
    dropped.items.add(new File([bytes], "picture.png", { type: "image/png" }));
    const box = document.querySelector("#box");
    for (const kind of ["dragover", "drop"]) box.dispatchEvent(new DragEvent(kind, { dataTransfer: dropped, bubbles: true, cancelable: true }));
  }, scene.png);
  await page.waitForSelector("#thumbs img");
  await ask(page, "the cat sat on the mat");
  await ended(page);
  assert.equal(await page.locator("#thumbs img").count(), 0);
  assert.equal(await page.locator(".user .pictures img").count(), 1);
  assert.ok(await page.$eval(".user .pictures img", (image) => image.naturalWidth > 0), "the picture is not shown");
  assert.equal(await page.locator(".trouble").count(), 0);
  assert.match(await page.textContent("#wrote"), /an image/);
  await page.reload();
  await page.waitForSelector(".user .pictures img");
});
