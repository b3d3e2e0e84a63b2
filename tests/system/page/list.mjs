// The list of chats: searched, renamed, exported, deleted.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { drive, open } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene);
  const titles = () => page.$$eval("#chats .open", (all) => all.map((one) => one.textContent));
  assert.deepEqual(await titles(), ["Second", "First"]);

  await page.fill("#search", "lighthouse"); // a word of an answer
  await page.waitForFunction(() => document.querySelectorAll("#chats .open").length === 1);
  assert.deepEqual(await titles(), ["First"]);
  await page.fill("#search", "");
  await page.waitForFunction(() => document.querySelectorAll("#chats .open").length === 2);

  await page.click('[aria-label="Options for First"]');
  await page.click("#menu-rename");
  await page.fill("#ask-input", "Keepers");
  await page.press("#ask-input", "Enter");
  await page.waitForSelector("text=Keepers");

  await page.click('[aria-label="Options for Keepers"]');
  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#menu-export")]);
  const exported = JSON.parse(await readFile(await download.path(), "utf-8"));
  assert.equal(download.suggestedFilename(), "Keepers.json");

  await page.click('[aria-label="Options for Second"]');
  await page.click("#menu-delete");
  await page.click("#ask-yes");
  await page.waitForFunction(() => document.querySelectorAll("#chats .open").length === 1);

  await page.click("#delete-all");
  await page.click("#ask-yes");
  await page.waitForSelector("#no-chats", { state: "visible" });
  return { messages: exported.messages.map((message) => message.content) };
});
