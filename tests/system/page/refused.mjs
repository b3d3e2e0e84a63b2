// An edit and a regeneration that fail leave the chat as it was, and the edit to be sent again.

import assert from "node:assert/strict";
import { drive, open } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene, scene.chat);
  const said = () => page.$$eval(".user .bubble, .assistant.stored .body", (all) => all.map((one) => one.textContent.trim()));
  const before = await said();
  assert.equal(before.length, 4);

  await page.click(".again");
  await page.waitForSelector(".trouble");
  await page.waitForFunction(() => document.querySelectorAll(".assistant.stored").length === 2);
  assert.deepEqual(await said(), before);

  await page.$eval(".trouble", (trouble) => trouble.classList.add("first"));
  await page.hover(".user");
  await page.click('[aria-label="Edit this question"] >> nth=0');
  await page.fill(".user textarea", "Another question");
  await page.press(".user textarea", "Enter");
  await page.waitForSelector(".trouble:not(.first)");
  await page.waitForSelector(".user textarea");
  assert.equal(await page.inputValue(".user textarea"), "Another question");
  assert.match(await page.textContent(".trouble"), /cloud/);
  await page.click("text=Cancel");
  assert.deepEqual(await said(), before);
});
