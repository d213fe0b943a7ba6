// Text as tokens, and tokens as text: bytes or characters, as the file's metadata say.

const END_OF_TEXT = "<|endoftext|>";
const PROMPTS = ["\n", " "]; // in the place of an empty prompt, where documents are joined

/**
 * Return the vocabulary of a file's metadata: its `kind` and `size`; `end`, the token that ends a text, or null;
 * `encode`, from text to tokens; and `decoder`, which returns an object with `add`, from a token to the text that is
 * then complete, and `finish`, the text of what is not.
 */
export function readVocabulary(saved) {
  const hasEnd = saved?.end_of_text === END_OF_TEXT;
  if (saved?.kind === "bytes") return byteVocabulary(hasEnd);
  if (saved?.kind === "characters") return characterVocabulary(saved.characters, hasEnd);
  throw new Error(`the vocabulary must be bytes or characters, as the file holds no other, got ${saved?.kind ?? "none"}`);
}

/** Return the tokens of a prompt as the beginning of a text, as `minrnn sample` does. */
export function promptTokens(vocabulary, prompt) {
  if (vocabulary.end !== null) return [vocabulary.end, ...vocabulary.encode(prompt)];
  return prompt === "" ? vocabulary.first() : vocabulary.encode(prompt);
}

function byteVocabulary(hasEnd) {
  const encode = (text) => [...new TextEncoder().encode(text)];

  function decoder() {
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true }); // which leaves it in the text, as Python does
    return {
      add: (token) => utf8.decode(Uint8Array.of(token), { stream: true }),
      finish: () => utf8.decode(),
    };
  }

  return {
    kind: "bytes",
    size: 256 + hasEnd,
    end: hasEnd ? 256 : null,
    encode,
    decoder,
    first: () => encode(PROMPTS[0]),
  };
}

function characterVocabulary(text, hasEnd) {
  const characters = [...text]; // by code points, as Python does
  const tokens = new Map(characters.map((character, token) => [character, token]));

  function encode(prompt) {
    const unknown = [...new Set(prompt)].filter((character) => !tokens.has(character));
    if (unknown.length > 0) {
      const named = unknown.map((character) => JSON.stringify(character)).join(", ");
      throw new Error(`the prompt must use the model's ${characters.length} characters only, got ${named}`);
    }
    return [...prompt].map((character) => tokens.get(character));
  }

  return {
    kind: "characters",
    size: characters.length + hasEnd,
    end: hasEnd ? characters.length : null,
    encode,
    decoder: () => ({ add: (token) => characters[token], finish: () => "" }),
    first: () => [tokens.get(PROMPTS.find((character) => tokens.has(character))) ?? 0],
  };
}
