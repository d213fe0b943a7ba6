// The interface: it chooses a model, reads the settings, and shows the text as it is written.
//
// Each token is also an event "token" of the document, whose detail is the token's id.

import { Model } from "./model.js";
import { generate } from "./sampling.js";
import { promptTokens } from "./vocabulary.js";

const BESIDE = "model.onnx"; // loaded at first, if it lies beside the page
const FRAME = 16; // milliseconds of work, after which the browser may draw and see a click

const element = (id) => document.getElementById(id);
const number = (id) => element(id).valueAsNumber;
let model = null;
let writing = null; // the AbortController of a text that is being written

element("file").addEventListener("change", ({ target }) => {
  if (target.files.length > 0) load(target.files[0].name, () => target.files[0].arrayBuffer());
});
element("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
element("stop").addEventListener("click", () => writing?.abort());
load(BESIDE, async () => {
  const answer = await fetch(BESIDE);
  if (!answer.ok) throw new Error("it is not beside the page; choose a file");
  return answer.arrayBuffer();
});

/** Replace the model by that of a file; if it cannot be read, the one before stays. */
async function load(name, read) {
  enable({ choices: false, write: false });
  say(`Loading ${name} …`);
  try {
    const contents = new Uint8Array(await read());
    model = await Model.load(contents);
    element("model").textContent = describe(name, contents.length);
    say("Ready.");
  } catch (error) {
    complain(name, error);
  }
  enable({ choices: true, write: model !== null });
}

function describe(name, size) {
  const { kind, size: count } = model.vocabulary;
  const [file, state] = [size, model.stateBytes].map((bytes) => `${Math.ceil(bytes / 1000).toLocaleString("en")} kB`);
  return `${name}: ${file}, ${count} tokens (${kind}), a state of ${state}`;
}

/** Write a text with the settings of the form, until it ends or is stopped. */
async function write() {
  writing = new AbortController();
  enable({ stop: true });
  element("stop").focus(); // what is disabled would lose the keyboard's focus
  enable({ choices: false, write: false });
  try {
    await show(writing.signal);
  } catch (error) {
    complain("Writing", error);
  }
  enable({ choices: true, write: true });
  if (document.activeElement === element("stop")) element("write").focus();
  enable({ stop: false });
}

async function show(signal) {
  const { vocabulary } = model;
  const prompt = element("prompt").value;
  const tokens = promptTokens(vocabulary, prompt);
  const decoder = vocabulary.decoder();
  let text = "", count = 0, started = 0, end = "Done.";

  function draw() {
    append(text);
    text = "";
    element("progress").textContent = `${count} tokens${speed(count, started)}`;
  }

  element("given").textContent = prompt;
  element("output").textContent = "";
  say("Writing …");
  const settings = { temperature: number("temperature"), topK: number("top-k"), seed: number("seed") };
  const limits = { length: number("length"), pause: pauses(signal, draw) };
  try {
    for await (const token of generate(model, tokens, { ...settings, ...limits })) {
      started ||= performance.now();
      count += 1;
      if (token === vocabulary.end) end = "The text has ended.";
      else text += decoder.add(token);
      document.dispatchEvent(new CustomEvent("token", { detail: token }));
    }
  } catch (error) {
    if (!signal.aborted) throw error;
    end = "Stopped.";
  } finally {
    text += decoder.finish();
    draw();
  }
  say(end);
}

/** Return how many tokens a second were written after the first. */
function speed(count, started) {
  const seconds = (performance.now() - started) / 1000;
  return count > 1 ? `, ${Math.round((count - 1) / seconds).toLocaleString("en")} a second` : "";
}

/** Return a function that draws, where it is due, and lets the browser go on; it throws where the signal says stop. */
function pauses(signal, draw) {
  let due = performance.now() + FRAME;
  return async () => {
    if (performance.now() >= due) {
      draw();
      await new Promise((resolve) => setTimeout(resolve));
      due = performance.now() + FRAME;
    }
    signal.throwIfAborted();
  };
}

/** Append text, and follow it where the reader has not scrolled away. */
function append(text) {
  const box = element("text");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  element("output").append(text);
  if (follows) box.scrollTop = box.scrollHeight;
}

function enable(states) {
  for (const [id, enabled] of Object.entries(states)) element(id).disabled = !enabled;
}

function say(text) {
  element("status").classList.remove("error");
  element("status").textContent = text;
}

/** Say in one line what went wrong: errors of onnxruntime have several. */
function complain(what, error) {
  say(`${what}: ${String(error?.message ?? error).split("\n")[0]}`);
  element("status").classList.add("error");
}
