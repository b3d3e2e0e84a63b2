// What a hostile model wrote stays text: nothing runs, nothing is loaded, no address opens by itself.

import assert from "node:assert/strict";
import { drive, open } from "./drive.mjs";

await drive(async (scene) => {
  const { page, context } = scene;
  await open(scene, scene.chat);
  const found = await page.$$eval(".assistant .body *", (all) => ({
    tags: [...new Set(all.map((one) => one.tagName.toLowerCase()))],
    attributes: [...new Set(all.flatMap((one) => one.getAttributeNames()))],
  }));
  const dangerous = ["script", "img", "a", "iframe", "style", "link", "form", "input", "svg", "object", "base", "meta"];
  assert.deepEqual(found.tags.filter((tag) => dangerous.includes(tag)), []);
  assert.deepEqual(found.attributes.filter((name) => name.startsWith("on") || ["style", "id", "href", "src"].includes(name)), []);
  assert.equal(await page.evaluate(() => window.pwned), undefined);

  const addresses = await page.$$eval(".assistant button.address", (all) => all.map((one) => one.dataset.url));
  assert.deepEqual(addresses.filter((address) => !/^https?:/.test(address)), []);
  await page.click('.assistant button.address[data-url="https://evil.example/steal?q=1"]');
  assert.equal(await page.textContent("#link-url"), "https://evil.example/steal?q=1");
  assert.equal(await page.getAttribute("#link-open", "rel"), "noopener noreferrer");
  await page.keyboard.press("Escape");
  await page.waitForSelector("#link-open:not([href])", { state: "attached" }); // a dialog tells of its closing a little later
  assert.equal(context.pages().length, 1);

  await page.click(".assistant .code .copy");
  return { copied: await page.evaluate(() => navigator.clipboard.readText()), title: await page.textContent("#title") };
});
