// The cloud is gone in the middle of an answer, and comes back: the page says that it waits, and the answer goes on.

import assert from "node:assert/strict";
import { answerOf, ask, drive, ended, figuresOf, open, set } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene);
  await set(page, { temperature: 0, max_tokens: 80 });
  await ask(page, "Tell me a long story about a lighthouse keeper and a storm.");
  await page.waitForFunction(() => document.querySelector(".assistant .body")?.textContent.length > 60, null, { timeout: 60000 });
  process.kill(scene.cloud, "SIGKILL");
  await page.waitForSelector("#waiting", { state: "visible" });
  const before = await answerOf(page);
  assert.ok(await page.isVisible("#stop"));
  await ended(page);
  const whole = await answerOf(page);
  assert.ok(whole.startsWith(before.trim()) && whole.length > before.length, `${before} → ${whole}`);
  assert.ok(await page.isHidden("#waiting"));
  return { whole, replays: (await figuresOf(page)).replays };
});
