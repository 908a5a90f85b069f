// The panel beside the grid: one item large, at its place, why it was found, and where it looked.

import { $, clock, form, json } from "./api.js";
import * as chat from "./chat.js";
import * as grid from "./grid.js";
import { described, searchLike, state } from "./search.js";
import { date, number, t } from "./strings.js";

let subject = null; // {item, position} or {file, url, name}
let looking = null; // AbortController of the running "where"
let seen = null; // the map that is shown, {rows, columns, relevance}

/** Open the item at a position of the grid. */
export async function openAt(position) {
  const item = await grid.itemAt(position);
  if (item) open({ item, position });
}

export function openFile(file) {
  open({ file, url: URL.createObjectURL(file), name: file.name || t("pastedImage") });
}

function open(next) {
  if (subject?.url) URL.revokeObjectURL(subject.url);
  subject = next;
  const { item, position = -1 } = subject;
  hideWhere();
  $("panel-name").textContent = item?.name ?? subject.name;
  $("panel-previous").hidden = $("panel-next").hidden = !item;
  $("panel-previous").disabled = position <= 0;
  $("panel-next").disabled = position >= grid.size() - 1;
  showMedia();
  showPlace();
  showWhy(item);
  showSource(item);
  $("panel-found").hidden = !item?.found_text;
  $("panel-found").open = false;
  $("panel-found-text").textContent = item?.found_text ?? "";
  $("panel-similar").hidden = !item;
  $("panel-where").hidden = !canLook();
  $("panel-open").hidden = !item?.file;
  if (item?.file) $("panel-open").href = item.file + place(item);
  chat.about(subject);
  $("panel").hidden = false;
  $("panel-body").scrollTop = 0;
  grid.markOpen(position);
  $("panel-name").focus({ preventScroll: true });
}

export function close() {
  if ($("panel").hidden) return;
  chat.stop();
  hideWhere();
  $("panel-video").removeAttribute("src");
  const position = subject.position ?? -1;
  $("panel").hidden = true;
  grid.markOpen(-1);
  if (position >= 0) grid.focus(position);
  else $("text").focus();
}

/** Return the part of an address that opens a video at its second, a document at its page. */
function place(item) {
  if (item.kind === "video" && item.begin_s != null) return `#t=${item.begin_s}`;
  return item.page ? `#page=${item.page}` : "";
}

function showMedia() {
  const { item, file, url } = subject;
  const type = item ? item.kind : file.type.split("/")[0];
  const isVideo = type === "video" && Boolean(item ? item.file : url);
  const text = item && !item.image ? item.text : file?.type === "application/pdf" ? subject.name : "";
  const video = $("panel-video");
  const image = $("panel-image");
  video.hidden = !isVideo;
  image.hidden = isVideo || Boolean(text);
  $("panel-text").hidden = !text;
  $("panel-text").textContent = text;
  video.removeAttribute("src");
  image.removeAttribute("src");
  if (isVideo) {
    if (item?.image) video.poster = `${item.image}&size=1200`;
    else video.removeAttribute("poster");
    video.src = item ? item.file + place(item) : url;
    // A browser that cannot play it shows the frame that was searched.
    video.onerror = () => {
      if (!item?.image) return;
      video.hidden = true;
      image.hidden = false;
      image.src = `${item.image}&size=1200`;
    };
  } else if (!text) image.src = item ? `${item.image}&size=1200` : url;
  image.alt = item?.name ?? subject.name;
}

function showPlace() {
  const { item } = subject;
  const parts = [];
  if (item?.page) parts.push(t("pageOf", { page: item.page }));
  if (item?.begin_s != null) parts.push(t("moment", { begin: clock(item.begin_s), end: clock(item.end_s) }));
  if (item?.date) parts.push(date(item.date));
  if (item?.place) parts.push(item.place);
  $("panel-place").textContent = parts.join(" · ");
  $("panel-place").hidden = !parts.length;
}

function showSource(item) {
  $("panel-source").textContent = item ? item.source : t("notInIndex");
  $("panel-source").hidden = Boolean(item && item.source === item.text); // a text named after itself
}

function showWhy(item) {
  const parts = [];
  if (item?.score !== undefined) parts.push(t("whyScore", { score: number(item.score, 2) }));
  if (item?.words?.length) parts.push(t("whyWords", { words: item.words.join(", ") }));
  $("panel-why").textContent = parts.join(" · ");
  $("panel-why").hidden = !parts.length;
}

// --- where it looked -----------------------------------------------------------------------------

function canLook() {
  const { item, file } = subject;
  const isImage = item ? Boolean(item.image) : file.type.startsWith("image/");
  return Boolean(state.info?.where && isImage && state.shown && (state.shown.text || state.shown.attached));
}

/** Show which parts of the image made it match the search, or the words of an answer. */
export async function showWhere(words) {
  hideWhere();
  const own = (looking = new AbortController());
  const { item, file } = subject;
  const fields = { like: item?.id, image: file };
  const { text, attached } = state.shown ?? {};
  if (words) fields.text = words;
  else Object.assign(fields, { text, query: attached?.file });
  const query = words ? t("quoted", { words }) : described();
  tellWhere(t("whereSearching"));
  $("panel-where").setAttribute("aria-pressed", String(!words));
  $("stage").classList.add("looking");
  try {
    const options = { method: "POST", body: form(fields), signal: own.signal };
    seen = await json("/page/where", options);
    $("panel-video").pause();
    if (!$("panel-video").hidden) { // the map lies over the frame that was searched
      $("panel-video").hidden = true;
      $("panel-image").hidden = false;
      $("panel-image").src = `${item.image}&size=1200`;
    }
    await $("panel-image").decode().catch(() => {});
    const stands = drawHeat();
    tellWhere(t(stands ? "whereLegend" : "whereNothing", { query }));
    $("heat").setAttribute("aria-label", t("whereLegend", { query }));
    $("stage").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (error.name !== "AbortError") {
      hideWhere();
      tellWhere(error.message, true);
    }
  } finally {
    if (looking === own) $("stage").classList.remove("looking");
  }
}

function tellWhere(words, failed = false) {
  $("legend").textContent = words;
  $("legend").hidden = !words;
  $("legend").classList.toggle("failed", failed);
}

export function hideWhere() {
  looking?.abort();
  looking = null;
  if (seen && subject?.item?.kind === "video") {
    $("panel-video").hidden = false;
    $("panel-image").hidden = true;
  }
  seen = null;
  $("heat").hidden = true;
  $("stage").classList.remove("looking");
  $("panel-where").setAttribute("aria-pressed", "false");
  tellWhere("");
}

/** Darken the parts that did not matter; return whether any did. */
function drawHeat() {
  const { rows, columns, relevance } = seen;
  const largest = Math.max(...relevance.flat());
  const image = $("panel-image");
  const canvas = $("heat");
  if (largest < 0.01) return false; // of a cosine
  const small = new OffscreenCanvas(columns, rows);
  const pixels = new ImageData(columns, rows);
  relevance.flat().forEach((value, i) => {
    pixels.data[4 * i + 3] = 205 * (1 - Math.sqrt(Math.max(0, value) / largest));
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  // The image is fitted into its box: the map lies on the image, not on the margins.
  const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
  canvas.width = Math.round(image.naturalWidth * scale);
  canvas.height = Math.round(image.naturalHeight * scale);
  canvas.style.left = `${image.offsetLeft + (image.clientWidth - canvas.width) / 2}px`;
  canvas.style.top = `${image.offsetTop + (image.clientHeight - canvas.height) / 2}px`;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  canvas.hidden = false;
  return true;
}

// --- wiring --------------------------------------------------------------------------------------

grid.events.addEventListener("open", (event) => openAt(event.detail));
grid.events.addEventListener("shown", () => {
  if (!subject) return;
  subject.position = -1; // it was one of another list
  $("panel-previous").hidden = $("panel-next").hidden = true;
});
$("panel-close").onclick = close;
$("panel-previous").onclick = () => openAt(subject.position - 1);
$("panel-next").onclick = () => openAt(subject.position + 1);
$("panel-similar").onclick = () => searchLike(subject.item);
$("panel-where").onclick = () => {
  if ($("panel-where").getAttribute("aria-pressed") === "true") hideWhere();
  else showWhere();
};
$("chip-ask").onclick = () => openFile(state.attached.file);
addEventListener("resize", () => seen && drawHeat());
chat.events.addEventListener("where", (event) => showWhere(event.detail));

/** Put the open item into the chosen language. */
export function translated() {
  if ($("panel").hidden) return;
  showPlace();
  showWhy(subject.item);
  showSource(subject.item);
  chat.translated();
}
