// Draws each chart when it comes into view, in the colours of the page; keys, search in tables, light and dark.
const { charts, themes } = JSON.parse(document.getElementById("chart-data").textContent);
const root = document.documentElement, prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
const drawn = new Map(); // place -> the theme that it is drawn in

async function draw(place, theme = isDark() ? "dark" : "light") {
  if (drawn.get(place) === theme) return;
  drawn.set(place, theme);
  root.dataset.drawn = theme;
  // as many entries of a legend in a row as have room: what is beyond the edge would be cut off
  const columns = Math.max(1, Math.min(10, Math.floor((place.clientWidth - 60) / 110)));
  const narrow = place.clientWidth < 480 ? { labelLimit: (place.clientWidth - 60) / columns - 28 } : {};
  const config = { ...themes[theme], legend: { ...themes[theme].legend, columns, ...narrow } };
  // `ast`: expressions are interpreted, so that the page needs no eval
  const options = { ast: true, actions: false, renderer: "svg", config, tooltip: { theme: "custom", disableDefaultStyle: false } };
  await window.vegaEmbed(place, charts[place.dataset.chart], options);
  const picture = place.querySelector("svg");
  if (picture) picture.setAttribute("aria-hidden", "true"); // the place itself has the words
}

const places = [...document.querySelectorAll("[data-chart]")];
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
}, { rootMargin: "400px" });
places.forEach((place) => watcher.observe(place));

const button = document.getElementById("theme");
const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
const redraw = () => { name(); for (const place of drawn.keys()) draw(place); };
button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; redraw(); });
prefersDark.addEventListener("change", redraw);
name();

for (const field of document.querySelectorAll("[data-filter]")) {
  const table = document.getElementById(field.dataset.filter);
  const count = document.querySelector(`[data-count="${field.dataset.filter}"]`);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} events`;
  });
}

const menu = document.querySelector(".menu");
menu.addEventListener("click", (event) => { if (event.target.closest("a")) menu.open = false; });
const sections = [...document.querySelectorAll("main > .part")];
const goTo = (section) => { location.hash = section.id; };
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") menu.open = false;
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
  const below = sections.findIndex((section) => section.getBoundingClientRect().top > 80);
  if (event.key === "j") goTo(sections[below < 0 ? sections.length - 1 : below]);
  if (event.key === "k") goTo(sections[Math.max(0, (below < 0 ? sections.length : below) - 2)]);
  if (event.key === "t") button.click();
  if (event.key === "/") {
    const field = document.querySelector("[data-filter]");
    if (field) { event.preventDefault(); field.focus(); }
  }
});

// on paper what is folded is unfolded; what is out of view is drawn while nothing else is to do, as printing does not wait for it
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open])")];
  unfolded.forEach((each) => { each.open = true; });
});
addEventListener("afterprint", () => { unfolded.forEach((each) => { each.open = false; }); });
const all = new URLSearchParams(location.search).has("all"); // for those who take a picture
const later = () => {
  const next = places.find((place) => !drawn.has(place));
  if (next) draw(next).finally(() => (window.requestIdleCallback ?? setTimeout)(later));
};
if (all) places.forEach((place) => draw(place));
else addEventListener("load", () => setTimeout(later, 1000));
