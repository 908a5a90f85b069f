// Adding a folder from the page: the dialog, and the progress while it is indexed.

import { $, element, form, json } from "./api.js";
import { search, showFacets, state } from "./search.js";
import { number, t } from "./strings.js";

const POLL_MS = 700;
let latest = null; // the last progress that was told
let timer = 0;

function openDialog() {
  const roots = state.info.folders.map((name, i) => new Option(name, i));
  $("folder-root").replaceChildren(...roots);
  $("folder-path").value = "";
  $("folder-error").hidden = true;
  $("folder-dialog").showModal();
  propose();
}

/** Propose the folders inside the chosen one. */
async function propose() {
  const query = new URLSearchParams({ folder: $("folder-root").value, path: $("folder-path").value });
  const { folders } = await json(`/page/folders?${query}`).catch(() => ({ folders: [] }));
  $("folder-names").replaceChildren(...folders.map((name) => new Option(name)));
}

async function add(event) {
  event.preventDefault();
  const fields = { folder: $("folder-root").value, path: $("folder-path").value.trim() };
  try {
    show(await json("/page/adding", { method: "POST", body: form(fields) }));
    $("folder-dialog").close();
  } catch (error) {
    $("folder-error").textContent = error.message;
    $("folder-error").hidden = false;
  }
}

function show(progress) {
  const ended = latest?.running && !progress.running;
  latest = progress;
  $("adding").hidden = !progress.folder;
  if (!progress.folder) return;
  describe(progress);
  $("adding-bar").hidden = !progress.running;
  $("adding-stop").hidden = !progress.running;
  $("adding-close").hidden = progress.running;
  if (progress.total) {
    $("adding-bar").max = progress.total;
    $("adding-bar").value = progress.done;
  } else $("adding-bar").removeAttribute("value");
  clearTimeout(timer);
  if (progress.running) timer = setTimeout(poll, POLL_MS);
  if (ended) {
    showFacets();
    if (!state.shown) search();
  }
}

function describe(progress) {
  const { folder, running, total, done, error } = progress;
  const values = { folder };
  for (const name of ["done", "total", "added", "changed", "unchanged"]) values[name] = number(progress[name]);
  values.failed = number(progress.num_failed);
  let key = "added";
  if (running) key = total ? "indexed" : "scanning";
  else if (progress.stopped) key = "addStopped";
  $("adding-text").textContent = error ? `${folder}: ${error}` : t(key, values);
  const failed = progress.failed.map(([name, reason]) => element("li", "", `${name}: ${reason}`));
  const left = progress.left_out.map(([suffix, reason, n]) => element("li", "", t("leftOut", { n, suffix, reason })));
  $("adding-list").replaceChildren(...failed, ...left);
  $("adding-details").hidden = running || !(failed.length + left.length);
}

async function poll() {
  try {
    show(await json("/page/adding"));
  } catch {
    timer = setTimeout(poll, 4 * POLL_MS); // the server may come back
  }
}

/** Continue to show what was begun before the page was opened. */
export async function start() {
  if (state.info?.folders.length) await poll();
}

export function translated() {
  if (latest?.folder) describe(latest);
}

$("add-folder").onclick = openDialog;
$("folder-form").onsubmit = add;
$("folder-cancel").onclick = () => $("folder-dialog").close();
$("folder-root").onchange = propose;
$("folder-path").onchange = propose;
$("adding-stop").onclick = async () => show(await json("/page/adding/stop", { method: "POST" }));
$("adding-close").onclick = () => ($("adding").hidden = true);
