// A trajectory's tokens as elements, and what their colours mean. Text of a run becomes text, never markup.

const AUTHORS = ["prompt", "policy", "tool"];
const POLICY = 1;
const FATES = ["trained", "held back from growing", "held back from shrinking", "cut by the dual clip", "not trained"];
const RATIO = [0.01, 0.1, 1]; // edges of |log-ratio|
const DRIFT = [0.001, 0.01, 0.1]; // of |drift|
const LOGP = [-0.1, -0.7, -2.3, -6]; // of log-probs: 90 %, 50 %, 10 %, 0.25 %

function signed(x, edges) {
  const size = edges.filter((edge) => Math.abs(x) >= edge).length;
  if (Number.isNaN(x)) return "";
  return size ? (x > 0 ? "p" : "n") + size : "z";
}
const signs = ([small, middle, large]) => [
  ["n3", `≤ −${large}`], ["n2", `−${large} to −${middle}`], ["n1", `−${middle} to −${small}`], ["z", "about 0"],
  ["p1", `${small} to ${middle}`], ["p2", `${middle} to ${large}`], ["p3", `≥ ${large}`],
];

// name -> label, what it needs, class of the policy's token number m, legend
const COLOURS = {
  ratio: ["Log-ratio", "ratio", (t, m) => (t.fate[m] === 4 ? "" : signed(half(t.ratio, m), RATIO)), () => signs(RATIO)],
  clip: ["Clip", "fate", (t, m) => `f${t.fate[m]}`, () => FATES.map((name, f) => [`f${f}`, name])],
  drift: ["Drift", "gap", (t, m) => signed(half(t.gap, m), DRIFT), () => signs(DRIFT)],
  version: ["Version", "versions", (t, m) => `v${t.newest - t.versionOf[m] > 5 ? 5 : t.newest - t.versionOf[m]}`, versionLegend],
  author: ["Author", "segments", () => "a1", () => ["prompt", "policy", "tool", "template"].map((name, a) => [`a${a}`, name])],
  logp: ["Log-prob", "logp", (t, m) => `l${LOGP.filter((edge) => half(t.logp, m) <= edge).length}`, () => [
    ["l0", "above −0.1"], ["l1", "−0.1 to −0.7"], ["l2", "−0.7 to −2.3"], ["l3", "−2.3 to −6"], ["l4", "below −6"]]],
  none: ["None", "segments", () => "", () => []],
};

function versionLegend(t) {
  const ages = new Set(t.versions.map(([version]) => Math.min(5, t.newest - version)));
  return [...ages].sort().map((age) => [`v${age}`, age < 5 ? `version ${t.newest - age}` : `version ${t.newest - 5} or older`]);
}

// What cannot be seen, or would move what stands beside it, as something that can be read.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
function visible(text) {
  return text.replace(HIDDEN, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// What is found once a trajectory is shown: which of the policy's tokens each token is, and which version wrote it.
function prepared(t) {
  if (t.policyAt) return t;
  t.policyAt = new Int32Array(t.tokens).fill(-1);
  t.authorAt = new Uint8Array(t.tokens);
  let at = 0;
  let m = 0;
  for (const [author, count] of t.segments) {
    for (let i = at; i < at + count; i++) {
      t.authorAt[i] = author;
      if (author === POLICY) t.policyAt[i] = m++;
    }
    at += count;
  }
  t.newest = Math.max(-1, ...t.versions.map(([version]) => version));
  t.versionOf = new Int32Array(t.sampled);
  let next = 0;
  for (const [version, count] of t.versions) t.versionOf.fill(version, next, (next += count));
  return t;
}

class TokenPane {
  constructor(pieces) {
    this.pieces = pieces;
    this.readout = element("p", { class: "tv-readout" });
    this.body = element("div", { class: "tv-tokens", tabindex: "0", role: "group", "aria-label": "Tokens. Arrow keys go from one to the next." });
    this.body.addEventListener("pointerover", (event) => this.describe(event.target));
    this.body.addEventListener("click", (event) => this.choose(event.target));
    this.body.addEventListener("keydown", (event) => this.key(event));
    this.turn = 0;
  }

  // Draws in slices, so that a long trajectory is there at once; `still` says whether it is still wanted.
  async show(t, colour) {
    const turn = ++this.turn;
    this.t = prepared(t);
    this.spans = [];
    this.body.replaceChildren();
    this.current = -1;
    this.readout.textContent = "Point at a token, or choose one with the arrow keys.";
    let begin = 0;
    let drawn = 0;
    let last = 0;
    for (const [place, [author, count, branch]] of t.segments.entries()) {
      if (branch !== last) this.body.append(element("p", { class: "tv-branch" }, `Branch ${branch}: what was sampled besides`));
      last = branch;
      const holder = this.holder(t, author, count, place);
      const texts = this.pieces.texts(t, begin, begin + count);
      for (let from = 0; from < count; from += 4000) {
        holder.append(...texts.slice(from, from + 4000).map((text, i) => this.span(begin + from + i, text, colour)));
        drawn += 4000;
        if (drawn > 16000) {
          await new Promise((resolve) => setTimeout(resolve));
          if (turn !== this.turn) return;
          drawn = 0;
        }
      }
      begin += count;
    }
  }

  // Where a segment's tokens go: what tools said and prompts are folded.
  holder(t, author, count, place) {
    if (author === POLICY) {
      const made = element("div", { class: "tv-turn" });
      this.body.append(made);
      return made;
    }
    const made = element("div", { class: "tv-turn" });
    const folded = author === 2 || count > 400;
    const label = author === 2 ? "Tool" : "Prompt";
    this.body.append(element("details", { class: `tv-fold tv-${AUTHORS[author]}`, open: !folded }, element("summary", {}, `${label}, ${count.toLocaleString("en")} tokens`), made));
    return made;
  }

  span(i, text, colour) {
    const made = document.createElement("span");
    made.textContent = visible(text) || "·";
    made.tokenPlace = i;
    if (text.includes("\n")) made.className = "nl";
    else if (!text) made.className = "piece";
    this.spans[i] = made;
    this.tint(made, i, colour);
    return made;
  }

  tint(span, i, colour) {
    const m = this.t.policyAt[i];
    let kind = m < 0 ? "" : COLOURS[colour][2](this.t, m);
    if (colour === "author" && m < 0) kind = this.pieces.special.has(idAt(this.t, i)) ? "a3" : `a${this.t.authorAt[i]}`;
    if (kind) span.dataset.c = kind;
    else delete span.dataset.c;
  }

  paint(colour) {
    this.spans.forEach((span, i) => this.tint(span, i, colour));
  }

  describe(target) {
    const i = target.tokenPlace;
    if (i === undefined) return;
    const { t } = this;
    const m = t.policyAt[i];
    const said = [`token ${i + 1} of ${t.tokens}`, `id ${idAt(t, i)}`, JSON.stringify(target.textContent)];
    if (m < 0) said.push(`${AUTHORS[t.authorAt[i]]}${this.pieces.special.has(idAt(t, i)) ? ", of the template" : ""}`);
    else {
      said.push(`${m + 1}. of the policy`, `version ${t.versionOf[m]}`, `log-prob ${shown(half(t.logp, m))}`);
      if (t.recorded) said.push(`drift ${shown(half(t.gap, m))}`, `log-ratio ${shown(half(t.ratio, m))}`, FATES[t.fate[m]]);
    }
    this.readout.textContent = said.join(" · ");
  }

  choose(target) {
    if (target.tokenPlace === undefined) return;
    this.spans[this.current]?.removeAttribute("aria-current");
    this.current = target.tokenPlace;
    target.setAttribute("aria-current", "true");
    this.describe(target);
  }

  go(i) {
    const span = this.spans[Math.max(0, Math.min(this.spans.length - 1, i))];
    if (!span) return;
    const fold = span.closest("details");
    if (fold) fold.open = true;
    this.choose(span);
    span.scrollIntoView({ block: "nearest" });
  }

  key(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.go(this.current + by);
  }

  // The next token (`by` 1) or the one before (-1) that training held back, or whose drift is large.
  mark(by) {
    const { t } = this;
    for (let i = this.current + by; i >= 0 && i < t.tokens; i += by) {
      const m = t.policyAt[i];
      if (m < 0) continue;
      const notable = t.recorded ? (t.fate[m] > 0 && t.fate[m] < 4) || Math.abs(half(t.gap, m)) >= DRIFT[2] : half(t.logp, m) <= LOGP[3];
      if (notable) return this.go(i);
    }
    this.readout.textContent = by > 0 ? "No further token of note." : "No token of note before this one.";
  }

  fold() {
    const folds = [...this.body.querySelectorAll("details")];
    const open = folds.some((each) => !each.open);
    for (const each of folds) each.open = open;
  }
}

function shown(value) {
  return Number.isFinite(value) ? String(Number(value.toPrecision(3))).replace("-", "−") : "not known";
}
