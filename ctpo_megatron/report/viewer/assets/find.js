// Which trajectories are listed, and in what order.

const worst = (c) => (i) => Number(c.reward[i]);
const most = (column) => (c) => (i) => (c[column][i] === null ? null : -c[column][i]);
const ORDERS = {
  worst: ["Worst", worst],
  best: ["Best", (c) => (i) => -Number(c.reward[i])],
  longest: ["Longest", most("sampled")],
  clipped: ["Most clipped", most("clipped")],
  drifted: ["Most drifted", most("gap")],
  random: ["At random", (c, draw) => (i) => scattered(i, draw) + (c.part[i] < 0 ? 2 ** 32 : 0)], // those with tokens first
  file: ["As trained", () => (i) => i],
};

// A number that looks like chance, the same for the same draw.
function scattered(i, draw) {
  let x = (i + 1) * 0x9e3779b1 + draw * 0x85ebca6b;
  x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
  return (x ^ (x >>> 16)) >>> 0;
}

class Finder {
  constructor(index) {
    this.index = index;
    this.columns = index.columns;
    this.length = index.columns.id.length;
    this.steps = index.files.map((file) => file.step ?? 0);
    this.words = null;
  }

  // Whether anything is known by which trajectories could be so ordered.
  has(order) {
    const column = { clipped: "clipped", drifted: "gap" }[order];
    return column === undefined || this.columns[column].some((value) => value !== null);
  }

  // What the words are looked for in: lower case, made when the first search needs it.
  haystack() {
    const c = this.columns;
    this.words ??= c.id.map((id, i) => `${id} ${c.prompt[i]} ${c.answer[i]} ${c.given[i] ?? ""} ${c.excerpt[i]}`.toLowerCase());
    return this.words;
  }

  // Places of the trajectories that `wanted` asks for. `within`: only these, found in whole texts; null: all.
  find(wanted, within) {
    const c = this.columns;
    const { from, to, least, top, kind, status, source, held } = wanted;
    const words = within ? "" : wanted.text.trim().toLowerCase();
    const haystack = words ? this.haystack() : null;
    const found = [];
    for (let i = 0; i < this.length; i++) {
      const step = this.steps[c.file[i]];
      if (step < from || step > to) continue;
      if (kind && this.index.files[c.file[i]].kind !== kind) continue;
      if (held && c.part[i] < 0) continue;
      if (status !== null && c.status[i] !== status) continue;
      if (source !== null && c.source[i] !== source) continue;
      if (least > -Infinity && !(Number(c.reward[i]) >= least)) continue;
      if (top < Infinity && !(Number(c.reward[i]) <= top)) continue;
      if (within && !within.has(i)) continue;
      if (haystack && !haystack[i].includes(words)) continue;
      found.push(i);
    }
    return this.sorted(found, wanted.order, wanted.draw);
  }

  sorted(found, order, draw) {
    if (order === "file") return found;
    const key = ORDERS[order][1](this.columns, draw);
    const keys = new Float64Array(this.length).fill(NaN);
    for (const i of found) {
      const value = key(i);
      keys[i] = value === null || Number.isNaN(value) ? Infinity : value; // what is not known comes last
    }
    return found.sort((a, b) => (keys[a] === keys[b] ? a - b : keys[a] < keys[b] ? -1 : 1));
  }
}
