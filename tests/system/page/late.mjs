// The reply for a chat comes after another one was opened: the page shows the one that was opened last.

import assert from "node:assert/strict";
import { drive, open } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene);
  let release;
  const held = new Promise((resolve) => (release = resolve));
  await page.route(`**/api/chats/${scene.first}`, async (route) => {
    await held;
    await route.continue();
  });
  await page.click(`#chats li[data-id="${scene.first}"] .open`);
  await page.fill("#question", "Where does this go?");
  await page.press("#question", "Enter");
  assert.equal(await page.inputValue("#question"), "Where does this go?", "no chat is open yet");
  await page.click(`#chats li[data-id="${scene.second}"] .open`);
  await page.waitForSelector("text=A storm.");
  const late = page.waitForResponse(`**/api/chats/${scene.first}`);
  release();
  await late;
  await page.waitForLoadState("networkidle");
  assert.equal(await page.textContent("#messages .user .bubble"), "Second");
  assert.equal(await page.textContent("#title"), "Second");
});
