// What the panel says of one answer.

import { answerOf, ask, drive, ended, figuresOf, open, set } from "./drive.mjs";

await drive(async (scene) => {
  const { page } = scene;
  await open(scene);
  await set(page, { temperature: 0, max_tokens: 40 });
  await ask(page, scene.question);
  await ended(page);
  await page.waitForFunction(() => document.querySelector("#attack-text").textContent || document.querySelector("#attack-lead").textContent.includes("nothing"));
  const text = (id) => page.textContent(`#${id}`);
  const drawn = await page.$eval("#strip", (canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(Array.from({ length: data.length / 4 }, (_, at) => data.slice(4 * at, 4 * at + 4).join())).size;
  });
  return {
    answer: await answerOf(page),
    figures: await figuresOf(page),
    shown: await page.$$eval("[data-figure]", (all) => all.map((one) => one.textContent)),
    vectors: parseInt(await page.getAttribute("#strip", "aria-label"), 10),
    wrote: await text("wrote"),
    read: await text("read"),
    lead: await text("attack-lead"),
    attack: await text("attack-text"),
    limit: await text("limit"),
    colours: drawn,
  };
});
