// Opens a bundle's page in headless Chromium, gives it an input, and prints what it says as JSON. Arguments: the node_modules
// with playwright-core, the browser, the page's address, a text or a file, and where a screenshot goes.
import { existsSync } from "node:fs";
import { createRequire } from "node:module";

const [modules, browser, address, given, shot] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/`)("playwright-core");
const window = await chromium.launch({ executablePath: browser, args: ["--no-sandbox"] });
const page = await window.newPage({ viewport: { width: 900, height: 640 } });
const elsewhere = [];
page.on("request", (request) => {
  const url = request.url();
  if (!url.startsWith(address) && !/^(blob|data):/.test(url)) elsewhere.push(url);
});
page.on("pageerror", (error) => console.error(error.message));
page.setDefaultTimeout(480_000);
await page.goto(address);
await page.waitForFunction("window.ready || window.failed");
const failed = await page.evaluate("window.failed");
if (failed) { console.error(failed); process.exit(1); }
if (existsSync(given)) await page.setInputFiles("input[type=file]", given);
else await page.fill("[name=text]", given);
await page.click("button");
await page.waitForFunction("window.answer !== undefined || document.getElementById('status').className === 'bad'");
const text = (id) => page.evaluate(`document.getElementById(${JSON.stringify(id)}).textContent`);
const said = { about: await text("about"), status: await text("status"), answer: await page.evaluate("window.answer ?? null"), elsewhere };
await page.screenshot({ path: shot });
await window.close();
console.log(JSON.stringify(said));
