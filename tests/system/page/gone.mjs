// A cloud that cannot be reached: the page says so, keeps the question, and offers to ask again.

import assert from "node:assert/strict";
import { ask, drive, ended, open } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene);
  await ask(page, "Is anybody there?");
  await ended(page);
  assert.match(await page.textContent(".trouble"), /cloud/);
  await page.click(".again");
  await ended(page);
  assert.equal(await page.locator(".message").count(), 2);
  await page.reload();
  await page.waitForSelector(".message");
  assert.equal(await page.locator(".user").count(), 1);
  return { trouble: await page.textContent("#messages") };
});
