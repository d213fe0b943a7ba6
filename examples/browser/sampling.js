// Writing: a token at a time from a carried state, in constant memory.

/**
 * Yield the tokens with which a model continues a prompt; the last one is the vocabulary's end of text, if it comes.
 *
 * `settings`: `length`, the most tokens; `temperature`, of which 0 chooses the most likely token; `topK`, the number
 * of the most likely tokens to draw from, 0 for all; `seed`, a whole number; and `pause`, awaited after each step.
 */
export async function* generate(model, prompt, { length, temperature, topK, seed, pause }) {
  const random = randomNumbers(seed);
  model.reset();
  let logits;
  for (const token of prompt) {
    logits = await model.step(token);
    await pause();
  }
  for (let count = 1; count <= length; count += 1) {
    const token = choose(logits, { temperature, topK, random });
    yield token;
    if (token === model.vocabulary.end || count === length) return;
    logits = await model.step(token);
    await pause();
  }
}

/** Draw a token: p = softmax(logits / temperature), restricted to the `topK` most likely tokens. */
export function choose(logits, { temperature, topK, random }) {
  if (!logits.every(Number.isFinite)) {
    throw new Error("the model's logits are not finite; its training has diverged");
  }
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a]); // of equal ones the first
  if (temperature === 0) return order[0];
  const kept = topK > 0 ? order.slice(0, topK) : order;
  const weights = kept.map((token) => Math.exp((logits[token] - logits[order[0]]) / temperature));
  let left = random() * weights.reduce((sum, weight) => sum + weight, 0);
  const rank = weights.findIndex((weight) => (left -= weight) < 0);
  return kept.at(rank); // the last one where the subtractions, rounded, leave a rest
}

/** Return a generator of numbers in [0, 1), equal for equal seeds: mulberry32, which is not torch's. */
export function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
}
