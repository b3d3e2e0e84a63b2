// A prompt streams, is stopped, edited and answered again; a reload finds the chat.

import assert from "node:assert/strict";
import { answerOf, ask, drive, ended, open, set } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene);
  assert.ok(!page.url().includes(scene.key), "the key is still in the address");
  await set(page, { temperature: 0, max_tokens: 200 });

  await ask(page, "Tell me a long story about a lighthouse keeper and a storm.");
  const lengths = [];
  while (lengths.length < 3) {
    const length = (await answerOf(page)).length;
    if (length > (lengths.at(-1) ?? 0)) lengths.push(length);
    await page.waitForTimeout(50);
  }
  assert.ok(await page.isVisible("#stop"), "it was whole at once");
  await page.click("#stop");
  await ended(page);
  assert.match(await page.textContent(".assistant .brief"), /Stopped/);
  const stopped = await answerOf(page);
  assert.ok(stopped.length >= lengths[2]);

  await page.hover(".user");
  await page.click('[aria-label="Edit this question"]');
  await page.fill(".user textarea", "What is the capital of France? Answer in one short sentence.");
  await page.press(".user textarea", "Enter");
  await ended(page);
  const edited = await answerOf(page);
  assert.match(edited, /Paris/);

  await page.click("text=Regenerate");
  await ended(page);
  assert.equal(await page.locator(".message").count(), 2);
  assert.equal(await answerOf(page), edited, "greedy answers are the same");

  await ask(page, "And of Italy?");
  await ended(page);
  assert.equal(await page.locator(".message").count(), 4);
  const last = await answerOf(page);

  await page.reload();
  await page.waitForSelector(".message");
  assert.equal(await page.locator(".message").count(), 4);
  assert.equal(await answerOf(page), last);
  assert.equal(await page.locator('#chats [aria-current="page"]').count(), 1);
  return { chat: new URL(page.url()).hash.slice("#chat=".length), edited, last };
});
