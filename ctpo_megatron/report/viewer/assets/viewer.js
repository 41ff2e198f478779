// The viewer: filters, the list, and the trajectory that is looked at.

const ROW = 58; // pixels; viewer.css says the same
const KEYS = [
  ["j, k", "next trajectory, the one before"], ["/", "search"], ["c", "next colour"], ["t", "fold or unfold tools and prompts"],
  ["n, p", "next token of note (held back, or with a large drift), the one before"], ["r", "draw at random anew"],
  ["← →", "from token to token, once the tokens have the focus"],
];

class Viewer {
  constructor(root) {
    this.root = root;
    this.key = root.dataset.key;
    this.parts = new Parts(root);
    this.draw = 1;
    this.order = "worst";
    this.within = null; // places whose whole text holds the words; null: index only
    this.chosen = -1;
  }

  async start() {
    this.status = element("p", { class: "tv-status", role: "status" }, "Reading the index …");
    this.root.append(this.status);
    try {
      this.index = await this.parts.json("index");
      this.pieces = this.index.pieces ? new Pieces(await this.parts.json("pieces")) : new Numbers();
    } catch (error) {
      this.status.textContent = error.message;
      return;
    }
    this.finder = new Finder(this.index);
    this.pane = new TokenPane(this.pieces);
    this.build();
    this.refresh();
    this.follow();
    window.addEventListener("hashchange", () => this.follow());
  }

  build() {
    const { files, names, notes } = this.index;
    const steps = files.map((file) => file.step ?? 0);
    const input = (label, attributes) => element("label", {}, label, element("input", { oninput: () => this.refresh(), ...attributes }));
    const select = (label, options) =>
      element("label", {}, label, element("select", { onchange: () => this.refresh() }, ...options.map(([value, text]) => element("option", { value }, text))));
    const kinds = [...new Set(files.map((file) => file.kind))];
    const word = { step: "training", eval: "evaluations", agents: "agents" };
    this.fields = {
      text: input("Text", { type: "search", size: 18 }),
      from: input("Step from", { type: "number", min: Math.min(...steps), max: Math.max(...steps), step: 1 }),
      to: input("to", { type: "number", min: Math.min(...steps), max: Math.max(...steps), step: 1 }),
      least: input("Reward from", { type: "number", step: "any" }),
      top: input("to", { type: "number", step: "any" }),
      kind: select("Of", [["", "all"], ...kinds.map((kind) => [kind, word[kind]])]),
      status: select("Status", [["", "any"], ...names.status.map((name, i) => [i, visible(name)])]),
      source: select("Source", [["", "any"], ...names.source.map((name, i) => [i, visible(name)])]),
    };
    if (this.index.columns.part.some((part) => part < 0)) this.fields.held = input("Only with tokens", { type: "checkbox" });
    const everywhere = element("button", { type: "button", onclick: () => this.searchTexts() }, "Search whole texts");
    const { text, from, to, least, top, ...others } = this.fields;
    const pair = (...both) => element("span", { class: "tv-pair" }, ...both);
    this.orders = element("div", { class: "tv-orders", role: "group", "aria-label": "Which come first" },
      ...Object.entries(ORDERS).map(([order, [label]]) => element("button", {
        type: "button", "data-order": order, disabled: !this.finder.has(order),
        title: this.finder.has(order) ? null : "this run recorded nothing of training token by token",
        onclick: () => this.reorder(order),
      }, label)));
    this.list = element("div", { class: "tv-list", tabindex: "0", role: "listbox", "aria-label": "Trajectories" });
    this.list.addEventListener("scroll", () => this.drawRows());
    this.list.addEventListener("keydown", (event) => this.listKey(event));
    this.detail = element("div", { class: "tv-detail" });
    const help = element("details", { class: "tv-help" }, element("summary", {}, "Keys"),
      element("dl", {}, ...KEYS.flatMap(([key, what]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, what)])));
    this.root.append(
      ...notes.map((note) => element("p", { class: "tv-note" }, visible(note))),
      element("form", { class: "tv-filters", role: "search", "aria-label": "Filter trajectories", onsubmit: (event) => event.preventDefault() },
        text, pair(from, to), pair(least, top), ...Object.values(others), everywhere),
      this.orders, this.status, element("div", { class: "tv-columns" }, this.list, this.detail), help);
    this.root.addEventListener("keydown", (event) => this.shortcut(event));
    new ResizeObserver(() => this.drawRows()).observe(this.list);
  }

  wanted() {
    const text = (name) => this.fields[name].lastElementChild.value;
    const number = (name, otherwise) => (text(name) === "" ? otherwise : Number(text(name)));
    return {
      text: text("text"), from: number("from", -Infinity), to: number("to", Infinity), least: number("least", -Infinity),
      top: number("top", Infinity), kind: text("kind"), status: number("status", null), source: number("source", null),
      held: this.fields.held?.lastElementChild.checked ?? false, order: this.order, draw: this.draw,
    };
  }

  refresh(within = null) {
    this.search?.abort();
    this.search = null;
    this.within = within;
    const wanted = this.wanted();
    this.found = this.finder.find(wanted, within);
    for (const button of this.orders.children) button.setAttribute("aria-pressed", String(button.dataset.order === this.order));
    const number = (value) => value.toLocaleString("en");
    this.status.textContent = `${number(this.found.length)} of ${number(this.finder.length)} trajectories${within ? ", found in whole texts" : ""}`;
    this.list.scrollTop = 0;
    this.drawRows();
    if (this.found.length && !this.found.includes(this.chosen)) this.choose(0);
    if (!this.found.length) this.detail.replaceChildren(element("p", {}, "No trajectory is like that."));
  }

  reorder(order) {
    if (order === "random" && this.order === "random") this.draw += 1;
    this.order = order;
    this.chosen = -1;
    this.refresh(this.within);
  }

  // Looks through the parts of what is listed for the words, whole texts and prompts.
  async searchTexts() {
    const words = this.wanted().text.trim().toLowerCase();
    if (!words) {
      this.status.textContent = "Write under Text what to look for.";
      return;
    }
    this.search?.abort();
    const search = (this.search = new AbortController());
    const { part, place } = this.index.columns;
    const listed = this.finder.find({ ...this.wanted(), text: "", order: "file" }, null).filter((i) => part[i] >= 0);
    const byPart = Map.groupBy ? Map.groupBy(listed, (i) => part[i]) : grouped(listed, (i) => part[i]);
    const hits = new Set();
    let done = 0;
    for (const [number, members] of byPart) {
      this.status.textContent = `Searching, ${++done} of ${byPart.size} parts, ${hits.size} found. Esc ends it.`;
      let trajectories;
      try {
        trajectories = await this.parts.trajectories(this.index.parts[number]);
      } catch (error) {
        this.status.textContent = error.message;
        return;
      }
      if (search.signal.aborted) return;
      for (const i of members) if (this.wholeText(trajectories[place[i]]).includes(words)) hits.add(i);
    }
    this.refresh(hits);
  }

  wholeText(t) {
    if (t.text !== null) return t.text.toLowerCase();
    let at = 0;
    return t.segments.map(([, count]) => joined(this.pieces, t, at, (at += count))).join("\n").toLowerCase();
  }

  // The rows that can be seen, and no others.
  drawRows() {
    if (!this.found) return;
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 3);
    const last = Math.min(this.found.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 3);
    const space = element("div", { class: "tv-space", role: "presentation" });
    space.style.height = `${this.found.length * ROW}px`;
    for (let place = first; place < last; place++) space.append(this.row(place));
    this.list.replaceChildren(space);
    const active = this.found.indexOf(this.chosen);
    if (active >= first && active < last) this.list.setAttribute("aria-activedescendant", `${this.key}-${active}`);
    else this.list.removeAttribute("aria-activedescendant");
  }

  row(place) {
    const c = this.index.columns;
    const i = this.found[place];
    const file = this.index.files[c.file[i]];
    const facts = [file.step === null ? file.kind : `${file.kind} ${file.step}`, `reward ${shown(Number(c.reward[i]))}`, `${c.sampled[i].toLocaleString("en")} tokens`];
    if (this.order === "clipped" && c.clipped[i] !== null) facts.unshift(`clipped ${shown(100 * c.clipped[i])} %`);
    if (this.order === "drifted" && c.gap[i] !== null) facts.unshift(`drift ${shown(c.gap[i])}`);
    const made = element("div", {
      class: "tv-row", role: "option", id: `${this.key}-${place}`, "aria-selected": String(i === this.chosen),
      "aria-setsize": this.found.length, "aria-posinset": place + 1, onclick: () => this.choose(place),
    }, element("span", { class: "tv-facts" }, element("b", {}, visible(c.id[i])), ` ${facts.join(" · ")}`),
      element("span", { class: "tv-excerpt", dir: "ltr" }, visible(c.excerpt[i]).replaceAll("\n", " ") || "(nothing)"));
    made.style.top = `${place * ROW}px`;
    return made;
  }

  async choose(place) {
    const i = this.found[place];
    if (i === undefined) return;
    this.chosen = i;
    const top = place * ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + ROW - this.list.clientHeight;
    this.drawRows();
    const { part, place: places } = this.index.columns;
    if (part[i] < 0) {
      this.detail.replaceChildren(this.head(i, null), element("p", {}, "The tokens of this one are not in the page."), element("pre", { class: "tv-text" }, visible(this.index.columns.excerpt[i])));
      this.root.dataset.shown = this.index.columns.id[i];
      return;
    }
    try {
      const trajectories = await this.parts.trajectories(this.index.parts[part[i]]);
      if (this.chosen === i) await this.show(i, trajectories[places[i]]);
    } catch (error) {
      if (this.chosen === i) this.detail.replaceChildren(this.head(i, null), element("p", { role: "alert" }, error.message));
    }
  }

  async show(i, t) {
    prepared(t);
    const usable = Object.keys(COLOURS).filter((name) => t[COLOURS[name][1]] !== null);
    if (!usable.includes(this.colour)) this.colour = usable.includes(this.asked) ? this.asked : usable[0];
    const group = `${this.key}-colour`;
    const radios = usable.map((name) => element("label", {}, element("input", {
      type: "radio", name: group, value: name, checked: name === this.colour, onchange: () => this.paint(t, name),
    }), COLOURS[name][0]));
    this.legend = element("ul", { class: "tv-legend", "aria-label": "Colours" });
    const text = t.text === null ? null : element("details", { open: true }, element("summary", {}, "Text as recorded"), element("pre", { class: "tv-text" }, visible(t.text)));
    this.detail.replaceChildren(this.head(i, t), element("fieldset", { class: "tv-colours" }, element("legend", {}, "Colour by"), ...radios),
      this.legend, this.pane.readout, ...(text ? [text] : []), this.pane.body);
    this.drawLegend(t);
    await this.pane.show(t, this.colour);
    this.root.dataset.shown = this.index.columns.id[i];
  }

  paint(t, name) {
    this.colour = this.asked = name;
    this.drawLegend(t);
    this.pane.paint(name);
  }

  drawLegend(t) {
    this.legend.replaceChildren(...COLOURS[this.colour][3](t).map(([kind, label]) => element("li", {}, element("span", { "data-c": kind, "aria-hidden": "true" }, "ab"), ` ${label}`)));
  }

  head(i, t) {
    const c = this.index.columns;
    const file = this.index.files[c.file[i]];
    const facts = [
      ["Reward", shown(Number(c.reward[i])) + (c.undecided[i] ? " (undecided)" : "")], ["Status", this.index.names.status[c.status[i]]],
      ["Judged", c.given[i] ?? "nothing"], ["Answer", c.answer[i]],
      ["From", file.name], ["Prompt", c.prompt[i]], ["Source", this.index.names.source[c.source[i]]],
      ["Tokens", `${c.sampled[i].toLocaleString("en")} sampled of ${c.tokens[i].toLocaleString("en")}`],
      ["Versions", c.oldest[i] === c.newest[i] ? c.newest[i] : `${c.oldest[i]} to ${c.newest[i]}`],
      ["Tool calls", `${c.calls[i]}${c.errors[i] ? `, ${c.errors[i]} failed` : ""}`],
    ];
    if (c.clipped[i] !== null) facts.push(["Clipped", `${shown(100 * c.clipped[i])} %`]);
    if (c.ratio[i] !== null) facts.push(["Largest log-ratio", shown(c.ratio[i])]);
    if (c.gap[i] !== null) facts.push(["Mean drift", shown(c.gap[i])]);
    if (t) {
      facts.push(["Seconds", shown(Number(t.seconds))]);
      for (const [name, value] of Object.entries(t.terms)) facts.push([name, String(value)]);
      if (t.why) facts.push(["Why", t.why]);
    }
    return element("div", {}, element("h3", {}, visible(c.id[i])),
      element("dl", { class: "tv-head" }, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, visible(name)), element("dd", {}, visible(String(value)))))));
  }

  step(by) {
    const place = this.found.indexOf(this.chosen) + by;
    if (place >= 0 && place < this.found.length) this.choose(place);
  }

  listKey(event) {
    const page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.found.length, End: this.found.length }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const place = this.found.indexOf(this.chosen) + by;
    this.choose(Math.max(0, Math.min(this.found.length - 1, place)));
  }

  shortcut(event) {
    if (event.key === "Escape" && this.search) return this.refresh(this.within);
    if (event.altKey || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "radio") return;
    const does = {
      j: () => this.step(1), k: () => this.step(-1), "/": () => this.fields.text.lastElementChild.focus(), t: () => this.pane.fold(),
      n: () => this.pane.mark(1), p: () => this.pane.mark(-1), r: () => this.reorder("random"), c: () => this.nextColour(),
    }[event.key];
    if (!does) return;
    event.preventDefault();
    event.stopPropagation(); // the page has keys of its own
    does();
  }

  nextColour() {
    const radios = [...this.detail.querySelectorAll("input[type=radio]")];
    if (radios.length) radios[(radios.findIndex((each) => each.checked) + 1) % radios.length].click();
  }

  // A link #KEY/FILE/ID leads to a trajectory.
  follow() {
    const [key, file, id] = decodeURIComponent(location.hash.slice(1)).split("/");
    if (key !== this.key || !id) return;
    const { columns, files } = this.index;
    const i = columns.id.findIndex((each, place) => each === id && files[columns.file[place]].name === file);
    if (i < 0) return;
    if (!this.found.includes(i)) this.found = this.finder.sorted([i, ...this.found], "file", 1);
    this.choose(this.found.indexOf(i));
    this.root.scrollIntoView();
  }
}

function grouped(values, key) {
  const groups = new Map();
  for (const value of values) groups.set(key(value), [...(groups.get(key(value)) ?? []), value]);
  return groups;
}

// The index is read when the viewer comes near, so that the rest of a page does not wait for it.
for (const root of document.querySelectorAll(".tv:not([data-ready])")) {
  root.dataset.ready = "";
  const begin = () => new Viewer(root).start();
  const near = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    near.disconnect();
    begin();
  }, { rootMargin: "400px" });
  near.observe(root);
}
