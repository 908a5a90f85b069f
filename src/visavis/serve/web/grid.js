// The grid: any number of items, of which only the rows near the screen are in the document.
//
// All tiles have one size, so the height of everything is known from the number of items, nothing
// moves when images arrive, and the scroll bar is right from the start. Items are asked for in
// blocks as their rows come near the screen.

import { $, clock, element } from "./api.js";
import { number, t } from "./strings.js";

const BLOCK = 96; // items of one request
const OVERSCAN = 2; // rows kept above and below the screen
const MAX_HEIGHT = 15_000_000; // pixels; browsers end above, some at 17 million
const NAME_HEIGHT = 36;
const hits = $("hits");

let load = null; // async (offset, limit, signal) -> items
let total = 0;
let items = []; // by position; holes are not loaded
let loading = new Map(); // block -> AbortController
let tiles = new Map(); // position -> li
let current = 0; // position of the tile that Tab reaches
let shape = { columns: 1, width: 0, rowHeight: 1, gap: 16 };
let opened = -1;
// "open" with the position; "failed" with an error; "shortened" with the number that can be reached;
// "shown" when another list is shown
export const events = new EventTarget();

/** Show a list: its length, its first items, and how to get others. */
export function show(size, first, loader) {
  for (const running of loading.values()) running.abort();
  loading = new Map();
  for (const tile of tiles.values()) tile.remove();
  tiles = new Map();
  [load, total, items, current, opened] = [loader, size, [...first], 0, -1];
  hits.classList.remove("waiting");
  hits.replaceChildren();
  const scroller = hits.closest("main");
  scroller.scrollTop = 0;
  if (window.scrollY > hits.offsetTop) window.scrollTo(0, 0);
  events.dispatchEvent(new Event("shown"));
  layOut();
}

export function wait() {
  hits.classList.add("waiting");
}

/** Show empty frames until the first answer comes. */
export function showSkeletons(size) {
  show(size, [], null);
}

export function size() {
  return total;
}

/** Return the item at a position, loaded if it must be; undefined outside of the list. */
export async function itemAt(position) {
  if (position < 0 || position >= total) return undefined;
  if (!items[position]) await loadBlock(Math.floor(position / BLOCK));
  return items[position];
}

/** Mark the tile that is open; -1: none. */
export function markOpen(position) {
  opened = position;
  for (const [at, tile] of tiles) mark(tile, at);
}

export function focus(position) {
  if (!total) return $("text").focus();
  current = Math.max(0, Math.min(total - 1, position));
  bringIntoView(current);
  draw();
  for (const [at, tile] of tiles) mark(tile, at);
  tiles.get(current)?.firstChild.focus({ preventScroll: true });
}

// --- layout --------------------------------------------------------------------------------------

function layOut() {
  const width = hits.clientWidth;
  const narrow = width < 560;
  const gap = narrow ? 12 : 18;
  const columns = narrow ? 2 : Math.max(2, Math.floor((width + gap) / (208 + gap)));
  const tileWidth = (width - gap * (columns - 1)) / columns;
  shape = { columns, gap, width: tileWidth, rowHeight: Math.round(tileWidth * 0.75) + NAME_HEIGHT + gap };
  const rows = Math.ceil(total / columns);
  const kept = Math.min(rows, Math.floor(MAX_HEIGHT / shape.rowHeight));
  if (kept < rows) {
    total = kept * columns;
    events.dispatchEvent(new CustomEvent("shortened", { detail: total }));
  }
  hits.style.height = `${kept * shape.rowHeight}px`;
  for (const [at, tile] of tiles) place(tile, at);
  draw();
}

function place(tile, at) {
  const { columns, width, gap, rowHeight } = shape;
  tile.style.width = `${width}px`;
  tile.style.transform = `translate(${(at % columns) * (width + gap)}px, ${Math.floor(at / columns) * rowHeight}px)`;
}

/** Put the rows near the screen into the document, and take the others out. */
function draw() {
  const top = hits.getBoundingClientRect().top;
  const { columns, rowHeight } = shape;
  const first = Math.max(0, Math.floor(-top / rowHeight) - OVERSCAN) * columns;
  const last = Math.min(total, (Math.ceil((innerHeight - top) / rowHeight) + OVERSCAN) * columns);
  const focused = document.activeElement?.closest?.(".hits li");
  for (const [at, tile] of tiles) {
    if ((at >= first && at < last) || tile === focused) continue;
    tile.querySelector("img")?.removeAttribute("src"); // ends a request that nobody waits for
    tile.remove();
    tiles.delete(at);
  }
  for (let at = first; at < last; at++) {
    if (tiles.has(at)) continue;
    const made = element("li");
    place(made, at);
    fill(made, at);
    insert(made, at);
    tiles.set(at, made);
    if (!items[at] && load) loadBlock(Math.floor(at / BLOCK));
  }
}

/** Insert in the order of positions: Tab and screen readers follow the document. */
function insert(tile, at) {
  tile.dataset.at = at;
  let next = hits.lastElementChild;
  while (next && Number(next.dataset.at) > at) next = next.previousElementSibling;
  if (next) next.after(tile);
  else hits.prepend(tile);
}

async function loadBlock(block) {
  if (loading.has(block)) return loading.get(block).done;
  const running = new AbortController();
  loading.set(block, running);
  const own = items;
  running.done = (async () => {
    try {
      const found = await load(block * BLOCK, BLOCK, running.signal);
      if (own !== items) return;
      found.forEach((item, i) => (items[block * BLOCK + i] = item));
      for (const [at, tile] of tiles) if (Math.floor(at / BLOCK) === block) fill(tile, at);
    } catch (error) {
      loading.delete(block); // the next look at these rows tries again
      if (error.name !== "AbortError") events.dispatchEvent(new CustomEvent("failed", { detail: error }));
    }
  })();
  return running.done;
}

// --- tiles ---------------------------------------------------------------------------------------

function fill(tile, at) {
  const item = items[at];
  tile.className = item ? "" : "skeleton";
  tile.setAttribute("aria-setsize", total);
  tile.setAttribute("aria-posinset", at + 1);
  const frame = element("span", "frame");
  if (!item) {
    tile.replaceChildren(frame);
    return;
  }
  const made = element("button", "hit");
  made.type = "button";
  const line = element("span", "line");
  line.append(element("span", "name", item.name));
  if (item.score !== undefined) {
    const score = element("span", "score", number(item.score, 2));
    score.title = t("score");
    line.append(score);
  }
  made.append(frame, line);
  made.onclick = () => {
    current = at;
    events.dispatchEvent(new CustomEvent("open", { detail: at }));
  };
  made.onfocus = () => {
    current = at;
    for (const [other, li] of tiles) mark(li, other);
  };
  fillFrame(frame, item);
  const hadFocus = tile.contains(document.activeElement);
  tile.replaceChildren(made);
  if (hadFocus) made.focus({ preventScroll: true });
  mark(tile, at);
}

function fillFrame(frame, item) {
  if (item.image) {
    const image = element("img", item.kind);
    image.alt = ""; // the name stands below it
    image.loading = "lazy";
    image.decoding = "async";
    image.onerror = () => image.hasAttribute("src") && image.replaceWith(element("span", "broken", t("broken")));
    image.src = `${item.image}&size=400`;
    frame.append(image);
  } else frame.append(element("span", "words", item.text));
  if (item.kind === "video") frame.append(element("span", "badge", `▶ ${item.begin_s != null ? clock(item.begin_s) : ""}`));
  if (item.words?.length) frame.append(element("span", "badge found", item.words.join(", ")));
  if (item.page) frame.append(element("span", "badge", t("pageOf", { page: item.page })));
}

function mark(tile, at) {
  const inside = tile.firstElementChild;
  if (!inside?.matches("button")) return;
  inside.tabIndex = at === current ? 0 : -1;
  if (at === opened) inside.setAttribute("aria-current", "true");
  else inside.removeAttribute("aria-current");
}

// --- keyboard and scrolling ----------------------------------------------------------------------

hits.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !total) return;
  const { columns, rowHeight } = shape;
  const screenful = Math.max(1, Math.floor(innerHeight / rowHeight)) * columns;
  const last = total - 1;
  const target = {
    ArrowLeft: current - 1,
    ArrowRight: current + 1,
    ArrowUp: current - columns < 0 ? current : current - columns,
    ArrowDown: current + columns > last ? current : current + columns,
    PageUp: current - screenful,
    PageDown: current + screenful,
    Home: 0,
    End: last,
  }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  focus(target);
});

function bringIntoView(position) {
  const top = hits.getBoundingClientRect().top + Math.floor(position / shape.columns) * shape.rowHeight;
  const main = hits.closest("main");
  const scrolls = main.scrollHeight > main.clientHeight + 1 && getComputedStyle(main).overflowY !== "visible";
  const above = scrolls ? main.getBoundingClientRect().top : 0;
  const below = scrolls ? main.getBoundingClientRect().bottom : innerHeight;
  let by = 0;
  if (top < above) by = top - above;
  else if (top + shape.rowHeight > below) by = top + shape.rowHeight - below;
  if (by) (scrolls ? main : window).scrollBy({ top: by, behavior: "instant" });
}

let waiting = false;
function drawSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}
document.addEventListener("scroll", drawSoon, { capture: true, passive: true });
addEventListener("resize", drawSoon);
new ResizeObserver(layOut).observe(hits);
