// Uses the web page as a person would and prints what it saw, for test_ui.py to judge.
// Arguments: chromium, address of the page, folder with bad.jsonl, a text that must not run.

const { readFileSync } = require("node:fs");
const { join } = require("node:path");
const { chromium } = require("playwright-core");

const [executablePath, url, folder, hostile] = process.argv.slice(2);
const DESKTOP = { width: 1280, height: 960 };
const PHONE = { width: 360, height: 740 };
const seen = { errors: [], widths: [], asked: [] };

async function open(browser, viewport) {
  const page = await browser.newPage({ viewport });
  page.on("console", (line) => line.type() === "error" && seen.errors.push(line.text()));
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  page.on("request", (request) => seen.asked.push(request.url()));
  page.on("dialog", (dialog) => seen.errors.push(dialog.message()));
  await page.goto(url);
  await page.getByRole("button", { name: "Rerank" }).waitFor();
  return page;
}

// Fill in what is given and return when a new ranking, or message, is there.
async function rerank(page, query, documents) {
  if (query) await page.getByLabel("Query").fill(query);
  if (documents) await page.getByLabel("Documents").fill(documents);
  await page.evaluate(() => (document.querySelector(".ranking, .message").id = "old"));
  await page.getByRole("button", { name: "Rerank" }).click();
  await page.locator(":is(.ranking, .message):not(#old)").waitFor();
}

async function chooseExample(page, name, query) {
  await page.getByRole("button", { name }).click();
  await page.waitForFunction(
    (query) => [...document.querySelectorAll("textarea")].some((e) => e.value === query),
    query,
  );
}

async function measure(page) {
  const widest = await page.evaluate(() => document.scrollingElement.scrollWidth);
  seen.widths.push([page.viewportSize().width, widest]);
}

async function atADesk(browser) {
  const page = await open(browser, DESKTOP);
  seen.labels = [];
  for (const label of ["Query", "Instruction", "Documents"])
    if ((await page.getByLabel(label).count()) === 1) seen.labels.push(label);
  await chooseExample(page, "Ears on a plane", "Why do my ears pop on a plane?");
  await rerank(page);
  seen.texts = await page.locator(".ranking .text").allInnerTexts();
  seen.moves = await page.locator(".ranking .was").allInnerTexts();
  seen.bars = await page
    .locator(".ranking .bar span")
    .evaluateAll((bars) => bars.map((bar) => bar.getBoundingClientRect().width));
  await measure(page);
  // What a browser may connect to without asking for it, such as a preconnect.
  seen.links = await page
    .locator("link, script[src], img, iframe")
    .evaluateAll((all) => all.map((e) => e.href || e.src).filter((url) => url))
    .then((urls) => urls.filter((link) => !link.startsWith(url) && !link.startsWith("data:")));
  const download = page.waitForEvent("download");
  await page.getByRole("link", { name: "Download CSV" }).click();
  seen.csv = readFileSync(await (await download).path(), "utf8");
  if (process.env.UI_SCREENSHOT) {
    await page.mouse.move(0, 0);
    await page.screenshot({ path: process.env.UI_SCREENSHOT, fullPage: true });
  }

  await rerank(page, hostile, hostile);
  seen.hostile = await page.locator(".ranking .text").allInnerTexts();
  seen.title = await page.title();
  await page.locator("input[type=file]").setInputFiles(join(folder, "bad.jsonl"));
  await page.getByText("bad.jsonl").or(page.getByText("bad .jsonl")).first().waitFor();
  await rerank(page);
  seen.fault = await page.getByRole("alert").innerText();
}

async function onAPhone(browser) {
  const page = await open(browser, PHONE);
  await measure(page);
  await rerank(page, "a", ["x".repeat(2000), "b c", "one\u00a0long\u00a0".repeat(80)].join("\n"));
  await measure(page);
}

async function main() {
  const browser = await chromium.launch({
    executablePath,
    args: [
      "--no-sandbox", "--disable-gpu", "--disable-background-networking",
      "--disable-component-update", "--disable-sync",
    ],
  });
  try {
    await atADesk(browser);
    await onAPhone(browser);
  } finally {
    await browser.close();
  }
  const hosts = seen.asked.map((url) => new URL(url)).filter(({ protocol }) => protocol !== "data:");
  seen.asked = [...new Set(hosts.map(({ origin }) => `${origin}/`))];
  console.log(JSON.stringify(seen));
}

main();
