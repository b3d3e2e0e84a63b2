// A chat that no longer fits the context: the page says what was left out, and says it again after a reload.

import assert from "node:assert/strict";
import { ask, drive, ended, open, set } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene, scene.chat);
  await set(page, { temperature: 0, max_tokens: 5 });
  await ask(page, "rain");
  await ended(page);
  assert.match(await page.textContent(".assistant:last-child .left-out"), /oldest turn was left out/);
  await page.reload();
  await page.waitForSelector(".left-out");
});
