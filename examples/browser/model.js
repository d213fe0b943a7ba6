// A language model's step, as `minrnn export RUN model.onnx` writes it, in onnxruntime-web.

import { readMetadata } from "./metadata.js";
import { readVocabulary } from "./vocabulary.js";

const RUNTIME = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
const ARRAYS = { float32: Float32Array, float64: Float64Array, int64: BigInt64Array };

/** A model with the state of one text. */
export class Model {
  #ort;
  #session;
  #states; // the inputs that are a state, as the metadata describe them
  #state; // their tensors, by the inputs' names

  constructor(ort, session, known) {
    this.#ort = ort;
    this.#session = session;
    this.#states = known.inputs.filter((input) => "next" in input);
    this.vocabulary = readVocabulary(known.vocabulary);
    this.stateBytes = this.#states.reduce((sum, input) => sum + firstValues(input).byteLength, 0);
    this.reset();
  }

  /** Read a file's content, a Uint8Array; throw an error of one line if it is no step of a language model. */
  static async load(contents) {
    const known = readMetadata(contents);
    check(known);
    const ort = await loadRuntime();
    const session = await ort.InferenceSession.create(contents, { executionProviders: ["wasm"] });
    return new Model(ort, session, known);
  }

  /** Forget all that was read. */
  reset() {
    const tensors = this.#states.map((input) => [input.name, this.#tensor(input, firstValues(input))]);
    this.#state = Object.fromEntries(tensors);
  }

  /** Read a token, and return the logits of the next one, a Float32Array. */
  async step(token) {
    const tokens = new this.#ort.Tensor("int64", BigInt64Array.of(BigInt(token)), [1]);
    const found = await this.#session.run({ tokens, ...this.#state });
    this.#state = Object.fromEntries(this.#states.map(({ name, next }) => [name, found[next]]));
    return found.logits.data;
  }

  #tensor(input, values) {
    return new this.#ort.Tensor(input.dtype, values, sizes(input));
  }
}

async function loadRuntime() {
  const ort = await import(RUNTIME).catch(() => {
    throw new Error("onnxruntime-web is missing: run `npm install` beside the page, and load it again");
  });
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  return ort;
}

/** Throw unless the metadata are those of a language model's step, with a vocabulary that this page reads. */
function check(known) {
  if (known.kind !== "language model" || known.form !== "step") {
    throw new Error(`the file must hold a language model's step, got a ${known.kind}'s ${known.form}`);
  }
  const { size } = readVocabulary(known.vocabulary);
  const logits = known.outputs.find(({ name }) => name === "logits");
  if (logits?.shape.at(-1) !== size) {
    throw new Error(`the model must have ${size} logits, one for each token, got ${logits?.shape.at(-1)}`);
  }
  for (const { name, dtype, shape } of known.inputs) {
    if (!(dtype in ARRAYS)) throw new Error(`the input ${name} must be float32, float64 or int64, got ${dtype}`);
    if (name === "tokens" && !["batch", 1].includes(shape[0])) {
      throw new Error(`the file must take one text at a time, got a batch of ${shape[0]}; export without --batch`);
    }
  }
}

/** Return an input's shape for one text. */
function sizes(input) {
  return input.shape.map((size) => (size === "batch" ? 1 : size));
}

/** Return the values of a state before the first step. */
function firstValues({ dtype, initial, ...input }) {
  const count = sizes(input).reduce((product, size) => product * size, 1);
  return new ARRAYS[dtype](count).fill(dtype === "int64" ? BigInt(initial) : initial);
}
