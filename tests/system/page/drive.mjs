// A real Chromium at the page of a real gateway: `node SCENARIO.mjs URL KEY [OPTIONS as JSON]`.
// A scenario fails by throwing; what it saw goes to stdout as one line of JSON.

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { chromium } from "playwright-core";

const BROWSER = [process.env.STIP_CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const PATIENCE = 120000; // milliseconds, for an answer on a busy machine

/** Runs a scenario, and sees to what holds in all of them: no console error, no request to anywhere else. */
export async function drive(scenario, { width = 1280, height = 800, colorScheme = "light", expected = [] } = {}) {
  const [, , base, key, options = "{}"] = process.argv;
  const browser = await chromium.launch({
    executablePath: BROWSER.find((path) => path && existsSync(path)),
    headless: true,
    chromiumSandbox: false,
    args: ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
  });
  const context = await browser.newContext({ viewport: { width, height }, colorScheme, acceptDownloads: true });
  await context.grantPermissions(["clipboard-read", "clipboard-write"]);
  const page = await context.newPage();
  page.setDefaultTimeout(20000);
  const errors = [];
  const elsewhere = [];
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  page.on("pageerror", (error) => errors.push(error.message));
  context.on("request", (request) => /^(data|blob):/.test(request.url()) || request.url().startsWith(`${base}/`) || elsewhere.push(request.url()));
  try {
    const seen = await scenario({ page, context, base, key, ...JSON.parse(options) });
    assert.deepEqual(errors.filter((error) => !expected.some((part) => error.includes(part))), [], "errors in the console");
    assert.deepEqual(elsewhere, [], "requests to elsewhere");
    console.log(JSON.stringify(seen ?? {}));
  } finally {
    await browser.close();
  }
}

/** Opens the page with its key, and perhaps at a chat. */
export async function open({ page, base, key }, chat = null) {
  await page.goto(`${base}/#key=${key}`);
  await page.waitForSelector("#app:not([aria-busy])");
  if (chat) {
    await page.click(`#chats li[data-id="${chat}"] .open`);
    await page.waitForSelector(".message");
  }
}

/** Types a question and sends it. */
export async function ask(page, text) {
  await page.fill("#question", text);
  await page.press("#question", "Enter");
}

/** Waits for the end of an answer, and for the last that the panel is told. */
export async function ended(page) {
  await page.waitForSelector(".assistant:last-child[aria-busy]", { state: "attached" }).catch(() => {});
  await page.waitForSelector(".assistant:last-child:not([aria-busy])", { timeout: PATIENCE });
  await page.waitForSelector("#stop", { state: "hidden", timeout: PATIENCE });
  await page.waitForLoadState("networkidle");
}

/** Changes settings in their dialog. */
export async function set(page, settings) {
  await page.click("#open-settings");
  for (const [name, value] of Object.entries(settings)) await page.fill(`#set-${name}`, String(value));
  await page.click("#settings-dialog .primary");
  await page.waitForSelector("#settings-dialog", { state: "hidden" });
}

export const answerOf = (page) => page.textContent(".assistant:last-child .body");

/** The panel's figures, by name. */
export const figuresOf = (page) =>
  page.$$eval("[data-figure]", (all) => Object.fromEntries(all.map((one) => [one.dataset.figure, Number(one.dataset.value)])));
