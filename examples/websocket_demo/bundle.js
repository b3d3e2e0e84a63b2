// The device's half of an export, from the files of its folder: what the cloud must not have never leaves the page.

/** files: a Map from name to Blob (a File of an <input type=file webkitdirectory> is one). */
export async function openBundle(files) {
  const file = (name) => {
    if (!files.has(name)) throw new Error(`the folder has no ${name}: choose OUT/device of an export`);
    return files.get(name);
  };
  const manifest = JSON.parse(await file("manifest.json").text());
  const { residual, vocab } = await readKey(file("key.safetensors"));
  const graph = await file("embedding.onnx").text(); // names its operations: this page only looks rows up
  if (manifest.kind !== "decoder" || !vocab || residual?.length !== manifest.hidden_size || /Mul|Add/.test(graph))
    throw new Error("this page is for decoders with plain token embeddings, a permuted stream and the classifier in the cloud");
  const tokenizer = new Tokenizer(JSON.parse(await file("tokenizer.json").text()));
  const table = new Table(file("embedding.onnx.data"), manifest.dtype, manifest.hidden_size);
  return {
    manifest,
    tokenizer,
    /** Embeddings of ids as the cloud may see them: a Float32Array, position j holds feature residual[j]. */
    async hidden(ids) {
      const rows = await Promise.all(ids.map((id) => table.row(id)));
      const permuted = new Float32Array(ids.length * residual.length);
      rows.forEach((row, at) => residual.forEach((from, to) => (permuted[at * residual.length + to] = row[from])));
      return permuted;
    },
    /** The token that an id of the cloud's stands for. */
    plain(permuted) {
      if (!(permuted < vocab.length)) throw new Error("the cloud answered with an id that does not exist");
      return vocab[permuted];
    },
  };
}

/** The Int32Arrays of a key file: a safetensors file, which is a length, a JSON header and the values. */
async function readKey(file) {
  const bytes = await file.arrayBuffer();
  const length = Number(new DataView(bytes).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, length)));
  const secret = {};
  for (const [name, entry] of Object.entries(header))
    if (entry.dtype === "I32")
      secret[name] = new Int32Array(bytes.slice(8 + length + entry.data_offsets[0], 8 + length + entry.data_offsets[1]));
  return secret;
}

/** The embedding table, of which only the rows that are wanted are read from the disk. */
class Table {
  #file;
  #dtype;
  #width;
  #rows = new Map();

  constructor(file, dtype, width) {
    if (dtype === "float16") throw new Error("this page reads tables in float32 and bfloat16");
    [this.#file, this.#dtype, this.#width] = [file, dtype, width];
  }

  async row(id) {
    if (!this.#rows.has(id)) {
      const size = this.#width * (this.#dtype === "float32" ? 4 : 2);
      const bytes = await this.#file.slice(id * size, (id + 1) * size).arrayBuffer();
      // bfloat16 is the upper half of a float32.
      this.#rows.set(id, this.#dtype === "float32" ? new Float32Array(bytes)
        : new Float32Array(Uint32Array.from(new Uint16Array(bytes), (half) => half << 16).buffer));
    }
    return this.#rows.get(id);
  }
}

// How byte-level tokenizers cut text before they merge, and how they write bytes as characters (GPT-2).
const WORDS = /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** A byte-level BPE of tokenizer.json, as GPT-2 and SmolLM2 have it. Throws for any other. */
export class Tokenizer {
  #ids; // by piece, in the characters that stand for bytes
  #pieces = new Map();
  #ranks;
  #special; // content → id
  #characters; // of each byte
  #bytes; // of each character

  constructor({ model, pre_tokenizer, normalizer, added_tokens }) {
    if (model.type !== "BPE" || normalizer || pre_tokenizer?.type !== "ByteLevel" || pre_tokenizer.add_prefix_space)
      throw new Error("this page reads plain byte-level BPE tokenizers");
    this.#ids = new Map(Object.entries(model.vocab));
    for (const [piece, id] of this.#ids) this.#pieces.set(id, piece);
    this.#ranks = new Map(model.merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.#special = new Map(added_tokens.map(({ content, id }) => [content, id]));
    this.#characters = byteCharacters();
    this.#bytes = new Map(this.#characters.map((character, byte) => [character, byte]));
  }

  encode(text) {
    const ids = [];
    const names = [...this.#special.keys()].map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    for (const part of names.length ? text.split(new RegExp(`(${names.join("|")})`)) : [text]) {
      if (this.#special.has(part)) ids.push(this.#special.get(part));
      else for (const [word] of part.matchAll(WORDS)) ids.push(...this.#merged(word).map((piece) => this.#ids.get(piece)));
    }
    return ids;
  }

  /** The bytes of a token; none for a special one, which is not text. */
  bytes(id) {
    const piece = this.#pieces.get(id) ?? "";
    return this.#special.has(piece) ? new Uint8Array() : Uint8Array.from(piece, (character) => this.#bytes.get(character));
  }

  #merged(word) {
    let pieces = [...new TextEncoder().encode(word)].map((byte) => this.#characters[byte]);
    while (pieces.length > 1) {
      const ranks = pieces.slice(1).map((piece, at) => this.#ranks.get(`${pieces[at]} ${piece}`) ?? Infinity);
      const best = Math.min(...ranks);
      if (best === Infinity) break;
      const next = [];
      for (let at = 0; at < pieces.length; at++) {
        if (ranks[at] === best) next.push(pieces[at] + pieces[++at]);
        else next.push(pieces[at]);
      }
      pieces = next;
    }
    return pieces;
  }
}

function byteCharacters() {
  const printable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++));
}
