// Parts: loaded once each, from the page or as scripts beside it, and decoded into arrays.

const LOADING = new Map(); // address of a script -> what waits for it

window.ctpoPart ??= (text) => LOADING.get(document.currentScript.getAttribute("src"))?.resolve(text);

class Parts {
  constructor(root) {
    this.root = root;
    this.base = root.dataset.base;
    this.kept = new Map(); // name -> promise of trajectories, the last used at the end
  }

  async json(name) {
    return JSON.parse(new TextDecoder().decode(await this.bytes(name)));
  }

  // The trajectories of a part. A few parts stay in memory: a neighbour is often asked for next.
  trajectories(name) {
    const found = this.kept.get(name) ?? this.bytes(name).then(readTrajectories);
    this.kept.delete(name);
    this.kept.set(name, found);
    found.catch(() => this.kept.delete(name));
    if (this.kept.size > 6) this.kept.delete(this.kept.keys().next().value);
    return found;
  }

  async bytes(name) {
    const text = await this.text(name);
    const binary = atob(text.trim());
    const packed = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) packed[i] = binary.charCodeAt(i);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  text(name) {
    const held = [...this.root.querySelectorAll("script[data-part]")].find((each) => each.dataset.part === name);
    if (held) return Promise.resolve(held.textContent);
    const address = `${this.base}${name}.js`;
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const done = (settle) => (value) => {
        LOADING.delete(address);
        script.remove();
        settle(value);
      };
      LOADING.set(address, { resolve: done(resolve) });
      const folder = decodeURIComponent(this.base);
      script.onerror = done(() =>
        reject(new Error(`${folder}${name}.js is not there. The folder ${folder} belongs beside this page; copy it along, or make the page again.`)));
      script.src = address;
      document.head.append(script);
    });
  }
}

// What parts.py describes.
function readTrajectories(bytes) {
  const size = new DataView(bytes.buffer).getUint32(0, true);
  const facts = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  return facts.map((each) => {
    let at = 4 + size + each.begin;
    const plane = (length) => bytes.subarray(at, (at += length));
    const [low, middle, high] = [plane(each.tokens), plane(each.tokens), plane(each.tokens)];
    const halves = () => [plane(each.sampled), plane(each.sampled)];
    const made = { ...each, low, middle, high, logp: halves(), gap: null, ratio: null, fate: null };
    if (each.recorded) [made.gap, made.ratio, made.fate] = [halves(), halves(), plane(each.sampled)];
    return made;
  });
}

const idAt = (t, i) => t.low[i] | (t.middle[i] << 8) | (t.high[i] << 16);

function half([high, low], i) {
  const exponent = (high[i] >> 2) & 31;
  const fraction = ((high[i] & 3) << 8) | low[i];
  const sign = high[i] & 128 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024);
}

// Bytes of tokens, by their ids.
class Pieces {
  constructor(table) {
    this.of = new Map(table.ids.map((id, place) => [id, Uint8Array.from(table.pieces[place], (c) => c.charCodeAt(0))]));
    this.special = new Set(table.special);
  }

  // The text of each of the tokens from `begin` to `end`: a character belongs to the token that completes it.
  texts(t, begin, end) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const texts = [];
    for (let i = begin; i < end; i++) {
      const bytes = this.of.get(idAt(t, i));
      texts.push(bytes ? decoder.decode(bytes, { stream: true }) : `${decoder.decode()}⟨${idAt(t, i)}⟩`);
    }
    const left = decoder.decode();
    if (left && texts.length) texts[texts.length - 1] += left;
    return texts;
  }
}

// The same tokens as one text: much quicker, for searching.
function joined(pieces, t, begin, end) {
  const found = [];
  let length = 0;
  for (let i = begin; i < end; i++) {
    const bytes = pieces.of.get(idAt(t, i));
    if (bytes) length += found[found.push(bytes) - 1].length;
  }
  const whole = new Uint8Array(length);
  let at = 0;
  for (const bytes of found) {
    whole.set(bytes, at);
    at += bytes.length;
  }
  return new TextDecoder().decode(whole);
}

// Without a tokenizer tokens are their numbers.
class Numbers {
  special = new Set();
  texts(t, begin, end) {
    return Array.from({ length: end - begin }, (_, i) => `${idAt(t, begin + i)} `);
  }
}
