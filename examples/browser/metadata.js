// The metadata of an ONNX file, which onnxruntime-web has no call for.
//
// The file is a protobuf message, ModelProto; its field 14 is a list of pairs: 1, the key, and 2, the value.

const KEY = "minrnn";
const METADATA = 14;
const PAIR = { key: 1, value: 2 };
const VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5;

/** Return what `minrnn export` wrote about a file, given its content as a Uint8Array; throw if it wrote nothing. */
export function readMetadata(contents) {
  const found = fields(contents).filter(({ number }) => number === METADATA).map(({ bytes }) => fields(bytes));
  const values = found.filter((pair) => textOf(pair, PAIR.key) === KEY).map((pair) => textOf(pair, PAIR.value));
  if (values.length === 0) {
    throw new Error("the file must be one that `minrnn export RUN model.onnx` wrote; this one has no such metadata");
  }
  return JSON.parse(values[0]);
}

function textOf(pair, number) {
  const bytes = pair.find((field) => field.number === number)?.bytes ?? new Uint8Array();
  return new TextDecoder().decode(bytes);
}

/** Return the fields of a message that hold bytes: text, messages and arrays. */
function fields(message) {
  const found = [];
  let position = 0;

  function varint() {
    let value = 0, scale = 1; // no shifts: they are of 32 bits, and a file may have 2 GiB
    for (;;) {
      const byte = message[position++];
      if (byte === undefined) throw notOnnx();
      value += (byte & 127) * scale;
      if (byte < 128) return value;
      scale *= 128;
    }
  }

  while (position < message.length) {
    const tag = varint();
    switch (tag % 8) {
      case VARINT: varint(); break;
      case FIXED64: position += 8; break;
      case FIXED32: position += 4; break;
      case BYTES: {
        const size = varint();
        found.push({ number: Math.floor(tag / 8), bytes: message.subarray(position, position + size) });
        position += size;
        break;
      }
      default: throw notOnnx();
    }
  }
  if (position > message.length) throw notOnnx();
  return found;
}

function notOnnx() {
  return new Error("the file must be an ONNX file; this one is another, or is cut short");
}
