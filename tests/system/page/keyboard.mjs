// Everything can be done without a mouse: reached, used, and left again.

import assert from "node:assert/strict";
import { drive, ended, open } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene, scene.chat);
  await page.evaluate(() => document.activeElement.blur());
  const reached = new Set();
  for (let step = 0; step < 60; step += 1) {
    await page.keyboard.press("Tab");
    reached.add(await page.evaluate(() => document.activeElement.id || document.activeElement.className));
  }
  for (const id of ["new-chat", "search", "theme", "open-settings", "toggle-panel", "thread", "question", "close-panel", "open"]) {
    assert.ok(reached.has(id), `${id} was not reached with Tab: ${[...reached]}`);
  }
  await page.focus("#open-settings");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#settings-dialog[open]");
  await page.keyboard.press("Escape");
  assert.equal(await page.evaluate(() => document.activeElement.id), "open-settings");

  const outline = await page.evaluate(() => {
    document.querySelector("#new-chat").focus();
    return getComputedStyle(document.querySelector("#new-chat")).outlineStyle;
  });
  assert.notEqual(outline, "none");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#welcome", { state: "visible" });
  assert.equal(await page.evaluate(() => document.activeElement.id), "question");
  await page.keyboard.type("the cat");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("sat");
  await page.keyboard.press("Enter");
  await ended(page);
  assert.equal(await page.textContent(".user .bubble"), "the cat\nsat");
});
