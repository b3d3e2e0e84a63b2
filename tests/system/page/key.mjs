// Without the key the page shows nothing and asks for it.

import assert from "node:assert/strict";
import { drive } from "./drive.mjs";

await drive(
  async ({ page, base, key }) => {
    await page.goto(base);
    await page.waitForSelector("#key-dialog[open]");
    await page.fill("#key", "not the key at all");
    await page.press("#key", "Enter");
    await page.waitForFunction(() => document.querySelector("#key-title").textContent.includes("not this gateway's"));
    await page.fill("#key", key);
    await page.press("#key", "Enter");
    await page.waitForSelector("#app:not([aria-busy])");
    assert.equal(await page.locator("dialog[open]").count(), 0);
    await page.reload(); // the key is kept as long as the tab
    await page.waitForSelector("#app:not([aria-busy])");
  },
  { expected: ["401"] },
);
