// A question that cannot be sent stays in the field; one that is sent twice at once is asked once.

import assert from "node:assert/strict";
import { ask, drive, ended, open, set } from "./drive.mjs";

await drive(
  async (scene) => {
    const { page } = scene;
    await open(scene);
    await set(page, { temperature: 0, max_tokens: 5 });
    const typed = () => page.inputValue("#question");

    await page.route("**/api/chats", (route) => (route.request().method() === "POST" ? route.abort() : route.continue()));
    await ask(page, "the cat sat");
    await page.waitForSelector("#toast:not([hidden])");
    assert.equal(await typed(), "the cat sat");
    await page.unroute("**/api/chats");

    await page.route("**/answer", (route) => route.abort(), { times: 1 });
    await page.press("#question", "Enter");
    await page.waitForSelector(".trouble");
    await page.waitForFunction(() => document.querySelector("#question").value === "the cat sat");
    assert.equal(await page.locator(".user").count(), 0, "the gateway does not have it");

    await page.click("#new-chat");
    await page.waitForSelector("#welcome", { state: "visible" });
    let made = 0;
    page.on("request", (request) => (made += request.method() === "POST" && request.url().endsWith("/api/chats")));
    await page.evaluate(() => {
      for (let time = 0; time < 2; time += 1) document.querySelector("#ideas button").click();
    });
    await ended(page);
    assert.equal(made, 1);
    assert.equal(await page.locator(".message").count(), 2);
    assert.equal(await typed(), "the cat sat", "what else was typed stays");
  },
  { expected: ["net::ERR_FAILED"] },
);
