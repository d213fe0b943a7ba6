// Drives the page of examples/browser in Chromium, as a reader would; tests/slow/test_browser.py calls it.
//
// From standard input it reads JSON: `page`, the page's folder, where playwright-core is; `url`, where it is served;
// `chromium`, the program; `visits`, each a list of `actions` on a freshly loaded page. An action is the values of
// fields by id (`fill`), a file to choose (`file`), a button to click (`click`), a number of tokens to wait for
// (`tokens`), and a picture to take at the end (`screenshot`), or some of these. Unless it waits for tokens, it ends when
// nothing is loaded or written any more.
//
// To standard output it writes, for each visit, `seen`, a list of what the page shows after each action, with the tokens
// written since the one before; and `problems`: messages of the console other than plain ones, errors, and requests that
// failed or went to another server.

import { createRequire } from "node:module";
import { join } from "node:path";

const LIMIT = 120_000; // milliseconds for one action, on a busy machine
const input = await new Response(process.stdin).json();
const { chromium } = createRequire(join(input.page, "package.json"))("playwright-core");
const browser = await chromium.launch({ executablePath: input.chromium, args: ["--no-sandbox"] });
try {
  const visits = [];
  for (const actions of input.visits) visits.push(await visit(actions));
  console.log(JSON.stringify(visits));
} finally {
  await browser.close();
}

async function visit(actions) {
  const page = await browser.newPage({ viewport: { width: 1100, height: 720 } });
  page.setDefaultTimeout(LIMIT);
  const problems = watch(page);
  await page.addInitScript(() => {
    window.tokens = [];
    document.addEventListener("token", ({ detail }) => window.tokens.push(detail));
  });
  await page.goto(input.url);
  await rest(page);
  const seen = [await look(page)];
  for (const action of actions) {
    await act(page, action);
    seen.push(await look(page));
  }
  await page.close();
  return { seen, problems };
}

function watch(page) {
  const problems = [];
  page.on("console", (message) => message.type() === "log" || problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("requestfailed", (request) => problems.push(`${request.url()}: ${request.failure().errorText}`));
  page.on("response", (answer) => answer.ok() || problems.push(`${answer.url()}: ${answer.status()}`));
  page.on("request", (request) => {
    if (!request.url().startsWith(input.url) && !request.url().startsWith("data:")) problems.push(request.url());
  });
  return problems;
}

async function act(page, action) {
  for (const [id, value] of Object.entries(action.fill ?? {})) await page.fill(`#${id}`, String(value));
  if (action.file) await page.setInputFiles("#file", action.file);
  if (action.click) await page.click(`#${action.click}`);
  if (action.tokens) await page.waitForFunction((count) => window.tokens.length >= count, action.tokens);
  else await rest(page);
  if (action.screenshot) await page.screenshot({ path: action.screenshot });
}

/** Wait until nothing is loaded or written. */
async function rest(page) {
  await page.waitForFunction(() => {
    const [choices, status] = ["choices", "status"].map((id) => document.getElementById(id));
    return !choices.disabled && status.textContent !== "";
  });
}

/** Return what the page shows, and the tokens since the last look. */
function look(page) {
  const parts = ["model", "given", "output", "progress", "status"];
  return page.evaluate((ids) => ({
    ...Object.fromEntries(ids.map((id) => [id, document.getElementById(id).textContent])),
    failed: document.getElementById("status").classList.contains("error"),
    can: ["write", "stop"].filter((id) => !document.getElementById(id).disabled),
    tokens: window.tokens.splice(0),
  }), parts);
}
