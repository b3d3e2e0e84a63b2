// Pictures of the page at three widths, for docs/.

import { ask, drive, ended, open, set } from "./drive.mjs";

await drive(async (scene) => {
  const { page, folder } = scene;
  const shoot = (name) => page.screenshot({ path: `${folder}/${name}.png` });
  const show = async (width, height, colorScheme) => {
    await page.setViewportSize({ width, height });
    await page.emulateMedia({ colorScheme });
    await page.mouse.move(0, 0);
    await page.waitForTimeout(400);
  };
  await open(scene);
  await set(page, { temperature: 0, max_tokens: 120 });
  await ask(page, "Write a Python function that checks whether a word is a palindrome.");
  await ended(page);
  await show(1280, 800, "light");
  await shoot("page");

  await page.click("#new-chat");
  await set(page, { temperature: 0, max_tokens: 120 });
  await ask(page, "Give me three tips for a good night of sleep.");
  await ended(page);
  await ask(page, "Repeat the tips, word for word."); // of which drafts are accepted
  await ended(page);
  await show(1920, 720, "dark");
  await shoot("page-car");
  await show(390, 844, "light");
  await shoot("page-phone");
  await page.click("#toggle-panel");
  await show(390, 844, "dark");
  await shoot("page-phone-panel");
}, { width: 1280, height: 800 });
