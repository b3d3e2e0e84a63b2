// stip.v1 in a browser: the frames of PROTOCOL.md, section 2, and a connection that asks and is answered in order.

const DTYPES = { float32: Float32Array, uint32: Uint32Array }; // all that a session in float32 has
const DEEPEST = 8; // headers are nested no deeper

/** The frame of a message: an ArrayBuffer. tensors: [values, shape], the values a Float32Array. */
export function write(header, ...tensors) {
  const packed = pack({ ...header, tensors: tensors.map(([, shape]) => ["float32", shape]) });
  const starts = [];
  let length = 4 + packed.length;
  for (const [values] of tensors) {
    length += -length & 15; // padding: a typed array begins at a multiple of its own width
    starts.push(length);
    length += values.byteLength;
  }
  const frame = new ArrayBuffer(length);
  new DataView(frame).setUint32(0, packed.length, true);
  new Uint8Array(frame).set(packed, 4);
  tensors.forEach(([values], at) => new Float32Array(frame, starts[at], values.length).set(values));
  return frame;
}

/** Header and tensors of a frame. The tensors are views of it: nothing is copied. */
export function read(frame) {
  const length = new DataView(frame).getUint32(0, true);
  const header = unpack(new Uint8Array(frame, 4, length));
  let at = 4 + length;
  const tensors = (header.tensors ?? []).map(([dtype, shape]) => {
    at += -at & 15;
    const values = new DTYPES[dtype](frame, at, shape.reduce((product, size) => product * size, 1));
    at += values.byteLength;
    return values;
  });
  return { header, tensors };
}

/** One connection: `ask` sends a message and gives its reply. onFrame sees every frame with "up" or "down". */
export class Connection {
  #socket;
  #waiting = []; // replies come in the order of their requests
  #onFrame;

  constructor(url, onFrame = () => {}) {
    this.#onFrame = onFrame;
    this.#socket = new WebSocket(url, ["stip.v1"]);
    this.#socket.binaryType = "arraybuffer";
    this.#socket.onmessage = ({ data }) => this.#receive(data);
    this.#socket.onclose = ({ code }) => this.#fail(new Error(`the cloud closed the connection (code ${code})`));
    this.opened = new Promise((resolve, reject) => {
      this.#socket.onopen = resolve;
      this.#socket.onerror = () => reject(new Error("no connection to the cloud; is this page's origin allowed there?"));
    });
  }

  async ask(header, ...tensors) {
    await this.opened;
    const frame = write(header, ...tensors);
    this.#onFrame("up", frame);
    this.#socket.send(frame);
    return new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }));
  }

  close() {
    this.#socket.close(1000);
  }

  #receive(frame) {
    this.#onFrame("down", frame);
    const waits = this.#waiting.shift();
    try {
      const reply = read(frame);
      if (reply.header.type === "error") throw new Error(`${reply.header.code}: ${reply.header.message}`);
      waits?.resolve(reply);
    } catch (error) {
      waits?.reject(error);
    }
  }

  #fail(error) {
    for (const { reject } of this.#waiting.splice(0)) reject(error);
  }
}

/** MessagePack of null, booleans, numbers, strings, arrays and plain objects: what headers are made of. */
export function pack(value) {
  const bytes = [];
  put(value, bytes);
  return new Uint8Array(bytes);
}

function put(value, bytes) {
  const head = (fixed, limit, wide, length) =>
    length < limit ? bytes.push(fixed | length) : bytes.push(wide, length >> 8, length & 255);
  if (value === null) bytes.push(0xc0);
  else if (typeof value === "boolean") bytes.push(value ? 0xc3 : 0xc2);
  else if (Number.isInteger(value) && value >= 0 && value < 2 ** 32)
    bytes.push(0xce, value >>> 24, (value >>> 16) & 255, (value >>> 8) & 255, value & 255);
  else if (typeof value === "number") {
    const real = new DataView(new ArrayBuffer(8));
    real.setFloat64(0, value);
    bytes.push(0xcb, ...new Uint8Array(real.buffer));
  } else if (typeof value === "string") {
    const text = new TextEncoder().encode(value);
    head(0xa0, 32, 0xda, text.length);
    bytes.push(...text);
  } else if (Array.isArray(value)) {
    head(0x90, 16, 0xdc, value.length);
    value.forEach((one) => put(one, bytes));
  } else {
    const entries = Object.entries(value);
    head(0x80, 16, 0xde, entries.length);
    entries.forEach((entry) => entry.forEach((one) => put(one, bytes)));
  }
}

/** The value that MessagePack bytes hold. Throws where they are anything else than one value. */
export function unpack(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  const take = (size, get) => {
    const value = get.call(view, at); // throws RangeError past the end
    at += size;
    return value;
  };
  const length = (size) => take(size, [, view.getUint8, view.getUint16, , view.getUint32][size]);
  const text = (size) => {
    if (at + size > bytes.length) throw new RangeError("a string passes the header's end");
    at += size;
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(at - size, at));
  };
  const value = (depth) => {
    if (depth > DEEPEST) throw new RangeError("the header is nested too deep");
    const array = (size) => {
      const values = [];
      while (values.length < size) values.push(value(depth + 1));
      return values;
    };
    const map = (size) => {
      const entries = [];
      while (entries.length < size) entries.push([value(depth + 1), value(depth + 1)]);
      return Object.fromEntries(entries); // own properties, "__proto__" too
    };
    const kind = take(1, view.getUint8);
    if (kind < 0x80) return kind;
    if (kind < 0x90) return map(kind & 15);
    if (kind < 0xa0) return array(kind & 15);
    if (kind < 0xc0) return text(kind & 31);
    if (kind >= 0xe0) return kind - 256;
    switch (kind) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xca: return take(4, view.getFloat32);
      case 0xcb: return take(8, view.getFloat64);
      case 0xcc: return length(1);
      case 0xcd: return length(2);
      case 0xce: return length(4);
      case 0xcf: return Number(take(8, view.getBigUint64));
      case 0xd0: return take(1, view.getInt8);
      case 0xd1: return take(2, view.getInt16);
      case 0xd2: return take(4, view.getInt32);
      case 0xd3: return Number(take(8, view.getBigInt64));
      case 0xd9: return text(length(1));
      case 0xda: return text(length(2));
      case 0xdb: return text(length(4));
      case 0xdc: return array(length(2));
      case 0xdd: return array(length(4));
      case 0xde: return map(length(2));
      case 0xdf: return map(length(4));
      default: throw new RangeError(`a header cannot hold the MessagePack type 0x${kind.toString(16)}`);
    }
  };
  const whole = value(0);
  if (at !== bytes.length) throw new RangeError("the header goes on behind its map");
  return whole;
}
