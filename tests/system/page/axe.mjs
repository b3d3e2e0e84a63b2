// An accessibility checker over the page's states, widths and colours.

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { drive, open } from "./drive.mjs";

const SIZES = [[390, 844], [1280, 800], [1920, 720]];
const source = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf-8");

await drive(async (scene) => {
  const { page } = scene;
  const found = [];
  const look = async (state) => {
    const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
    for (const { id, impact, nodes } of violations) {
      found.push({ state, id, impact, where: nodes.slice(0, 3).map((node) => `${node.target}: ${node.failureSummary}`) });
    }
  };
  for (const [width, height] of SIZES) {
    for (const colorScheme of ["light", "dark"]) {
      await page.setViewportSize({ width, height });
      await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
      await page.goto("about:blank");
      const name = `${width} ${colorScheme}`;
      await open(scene);
      await page.evaluate(source); // past the page's Content-Security-Policy
      await look(`${name} welcome`);
      if (width < 820) await page.click("#open-sidebar");
      await look(`${name} list`);
      await page.click(`#chats li[data-id="${scene.chat}"] .open`);
      await page.waitForSelector(".message");
      await look(`${name} chat`);
      if (!(await page.isVisible("#panel"))) await page.click("#toggle-panel");
      await look(`${name} panel`);
      if (width < 1180) await page.click("#close-panel");
      await page.click("#open-settings");
      await look(`${name} settings`);
      await page.click("#settings-dialog [value=cancel]");
      await page.click(".assistant button.address >> nth=0");
      await look(`${name} address`);
      await page.keyboard.press("Escape");
    }
  }
  return { violations: found };
});
