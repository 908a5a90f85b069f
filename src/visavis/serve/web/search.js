// Searching: words, an image, both, or another item; filters; what is shown for them.

import { $, button, element, form, json, showError } from "./api.js";
import * as grid from "./grid.js";
import { count, nodes, number, t } from "./strings.js";

const KINDS = ["image", "page", "video", "text"];
const PAGE = 96; // hits of one request

export const state = {
  attached: null, // {file, url, name}: the image that is searched with
  like: null, // the item that others should be like
  kinds: new Set(),
  info: null, // what the server says of itself
  shown: null, // the search whose hits are shown, {text, like, attached}; null: the whole index
};
let running = null; // AbortController of the latest search

/** Ask the server for what is typed and chosen, and show it. */
export async function search() {
  running?.abort();
  const own = (running = new AbortController());
  const text = $("text").value.trim();
  const { attached, like } = state;
  const asked = Boolean(text || attached || like);
  showError(null);
  say(t(asked ? "searching" : "loading"));
  grid.wait();
  showFilters();
  const filters = filterFields();
  const fields = { ...filters, text, like: like?.id, image: attached?.file, negative: $("negative").value.trim() };
  const load = asked
    ? (offset, k, signal) => post({ ...fields, offset, k }, signal)
    : (offset, limit, signal) => list({ ...filters, offset, limit }, signal);
  try {
    const found = await load(0, PAGE, own.signal);
    state.shown = asked ? { text, like, attached } : null;
    const items = found.hits ?? found.items;
    grid.show(found.total, items, async (...more) => {
      const next = await load(...more);
      return next.hits ?? next.items;
    });
    tell(found, asked, Object.keys(filters).length > 0);
  } catch (error) {
    if (error.name === "AbortError") return;
    grid.show(0, [], null);
    say();
    if (error.unreadable) detach();
    showError(error);
  }
}

async function post(fields, signal) {
  return json("/page/search", { method: "POST", body: form(fields), signal });
}

async function list(fields, signal) {
  const query = new URLSearchParams(fields);
  return json(`/page/items?${query}`, { signal });
}

function tell({ total, hits, nothing_similar: nothing }, asked, filtered) {
  if (!asked) {
    if (total || filtered) say(count(filtered ? "withFilters" : "inIndex", total), ".");
    else say(...nodes("empty", { command: element("b", "", "visavis index add") }));
    return;
  }
  const query = element("b", "", described());
  if (nothing) say(...nodes("nothingLike", { query }));
  else if (hits.length) say(...nodes("nearest", { query }));
  else say(...nodes(filtered ? "noHitsFilters" : "noHits", { query }));
}

/** Return what was searched for, in words. */
export function described() {
  const { like, attached, text } = state.shown ?? {};
  const negative = $("negative").value.trim();
  const parts = [];
  if (like) parts.push(t("likeItem", { name: like.name }));
  if (attached) parts.push(attached.name);
  if (text) parts.push(t("quoted", { words: text }));
  const whole = parts.join(" + ");
  return negative ? `${whole}, ${t("notWords", { words: negative })}` : whole;
}

function say(...parts) {
  $("status").replaceChildren(...parts);
}

grid.events.addEventListener("shortened", ({ detail }) => {
  setTimeout(() => $("status").append(" ", t("shortened", { n: number(detail) }))); // after `tell`
});

// --- the image that is searched with --------------------------------------------------------------

export function attach(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    showError(new Error(isMedia(file) ? t("onlyAsk") : t("notMedia", { name: file.name })));
    return;
  }
  detach();
  const url = URL.createObjectURL(file);
  state.attached = { file, url, name: file.name || t("pastedImage") };
  showChip(url, state.attached.name);
  $("chip-ask").hidden = false;
  search();
}

export function searchLike(item) {
  detach();
  state.like = item;
  showChip(item.image && `${item.image}&size=64`, item.name);
  $("chip-ask").hidden = true;
  search();
}

function showChip(url, name) {
  $("chip-image").hidden = !url;
  if (url) $("chip-image").src = url;
  $("chip-name").textContent = name;
  $("chip").hidden = false;
  $("text").value = ""; // words of an earlier search; new ones may be added
  $("text").placeholder = t("addWords");
}

export function detach() {
  if (state.attached) URL.revokeObjectURL(state.attached.url);
  state.attached = null;
  state.like = null;
  $("chip").hidden = true;
  $("file").value = "";
  showPlaceholder();
}

export function showPlaceholder() {
  const canDrop = matchMedia("(hover: hover) and (min-width: 46rem)").matches;
  $("text").placeholder = t(state.attached || state.like ? "addWords" : canDrop ? "describeOrDrop" : "describe");
}

export function isMedia(file) {
  return /^(image|video)\//.test(file.type) || file.type === "application/pdf";
}

// --- filters ---------------------------------------------------------------------------------------

function filterFields() {
  const found = {
    kinds: [...state.kinds].join(","),
    folder: $("folder").value.trim(),
    after: $("after").value,
    before: $("before").value,
  };
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value));
}

function showFilters() {
  const set = ["negative", "folder", "after", "before"].filter((id) => $(id).value.trim()).length;
  $("filter-count").textContent = set;
  $("filter-count").hidden = !set;
}

/** Show the kinds that the index holds, with their numbers, and its folders. */
export async function showFacets() {
  const facets = await json("/page/facets");
  const kinds = KINDS.filter((kind) => facets.kinds[kind]);
  const pills = kinds.map((kind) => kindPill(kind, t(kind), facets.kinds[kind]));
  const all = kindPill("", t("all"));
  $("kinds").replaceChildren(...(kinds.length > 1 ? [all, ...pills] : []));
  const option = ({ folder, count: n }) => {
    const made = element("option");
    made.value = folder;
    made.label = `${folder} (${number(n)})`;
    return made;
  };
  $("folders").replaceChildren(...facets.folders.map(option));
}

function kindPill(kind, words, n) {
  const pill = button("pill", words, () => {
    if (!kind) state.kinds.clear();
    else if (!state.kinds.delete(kind)) state.kinds.add(kind);
    for (const other of $("kinds").children) showPressed(other);
    search();
  });
  if (n) pill.append(element("span", "count", number(n)));
  pill.dataset.kind = kind;
  showPressed(pill);
  return pill;
}

function showPressed(pill) {
  const { kind } = pill.dataset;
  pill.setAttribute("aria-pressed", String(kind ? state.kinds.has(kind) : !state.kinds.size));
}

// --- wiring ----------------------------------------------------------------------------------------

$("search").onsubmit = (event) => {
  event.preventDefault();
  search();
};
$("text").addEventListener("search", () => $("text").value || search()); // its own cross was clicked
$("file").onchange = () => attach($("file").files[0]);
$("chip-remove").onclick = () => {
  detach();
  $("text").focus();
  search();
};
$("more-filters").onclick = () => {
  const hidden = !$("filter-fields").hidden;
  $("filter-fields").hidden = hidden;
  $("more-filters").setAttribute("aria-expanded", String(!hidden));
  if (!hidden) $("negative").focus();
};
$("filter-fields").onsubmit = (event) => {
  event.preventDefault();
  search();
};
$("filter-fields").onchange = () => search();
$("filter-fields").onreset = () => setTimeout(search); // after the fields are empty

/** Show the first items, and say what the server is; kinds and folders come after that. */
export async function start() {
  const told = json("/page/info").then((info) => {
    state.info = info;
    showInfo();
  });
  await Promise.all([search(), told.catch(showError)]);
  await showFacets().catch(showError);
}

export function showInfo() {
  const { info } = state;
  if (!info) return;
  $("about").textContent = t("model", { name: info.model });
  $("add-folder").hidden = !info.folders.length;
  const pills = info.examples.map((words) =>
    button("pill", words, () => {
      detach();
      $("text").value = words;
      search();
    }),
  );
  $("examples").replaceChildren(...pills);
}
