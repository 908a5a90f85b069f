// The page: starts the parts, and what concerns all of them: language, keys, drop and paste.

import { $, element, showError } from "./api.js";
import * as chat from "./chat.js";
import * as folders from "./folders.js";
import * as grid from "./grid.js";
import * as panel from "./panel.js";
import { attach, isMedia, search, showFacets, showInfo, showPlaceholder, start, state } from "./search.js";
import { LANGUAGES, chooseLanguage, language, t, translate } from "./strings.js";

// --- language ------------------------------------------------------------------------------------

for (const [code, name] of Object.entries(LANGUAGES)) {
  const option = new Option(name, code);
  option.lang = code;
  $("language").add(option);
}
$("language").onchange = () => {
  chooseLanguage($("language").value);
  showPlaceholder();
  showInfo();
  showFacets().catch(showError);
  panel.translated();
  folders.translated();
  search();
};

// --- keys ----------------------------------------------------------------------------------------

const KEYS = [
  ["/", "keySlash"],
  ["← → ↑ ↓", "keyArrows"],
  ["Home End", "keyEnds"],
  ["Enter", "keyEnter"],
  ["Esc", "keyEscape"],
  ["Enter", "keyAsk"],
  ["Ctrl V", "keyPaste"],
  ["?", "keyHelp"],
];

function openHelp() {
  const entries = KEYS.flatMap(([keys, words]) => {
    const term = element("dt");
    term.append(...keys.split(" ").map((key) => element("kbd", "", key)));
    return [term, element("dd", "", t(words))];
  });
  $("help-keys").replaceChildren(...entries);
  $("help").showModal();
}
$("help-open").onclick = openHelp;

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest?.("input, textarea, select");
  if (event.key === "Escape") panel.close();
  else if (typing) return;
  else if (event.key === "?") openHelp();
  else if (event.key === "/") {
    event.preventDefault();
    $("text").focus();
  }
});

// --- drop and paste ------------------------------------------------------------------------------

let dragDepth = 0; // dragenter and dragleave also fire for every child that is crossed
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");

function showDrop(shown) {
  if (!shown) dragDepth = 0;
  $("drop").hidden = !shown;
}
document.addEventListener("dragenter", (event) => {
  if (hasFiles(event)) showDrop(++dragDepth > 0);
});
document.addEventListener("dragleave", (event) => {
  if (hasFiles(event)) showDrop(--dragDepth > 0);
});
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  const over = event.target.closest?.("[data-drop]");
  for (const target of $("drop").children) target.classList.toggle("over", target === over);
});
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  showDrop(false);
  const { files } = event.dataTransfer;
  const asks = event.target.closest?.("[data-drop]")?.dataset.drop === "ask";
  take([...files], asks);
});

/** Search with a file, or ask about files. */
function take(files, asks) {
  const unusable = files.find((file) => !isMedia(file));
  if (unusable || !files.length) {
    showError(new Error(t("notMedia", { name: unusable?.name ?? "" })));
    return;
  }
  showError(null);
  if (!asks) attach(files[0]);
  else {
    panel.openFile(files[0]);
    if (files.length > 1) chat.attach(files.slice(1));
  }
}

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])].filter(isMedia);
  if (!files.length) return;
  event.preventDefault();
  if (event.target.closest?.("#chat")) chat.attach(files);
  else take(files, false);
});

// --- start ---------------------------------------------------------------------------------------

translate();
$("language").value = language;
showPlaceholder();
grid.showSkeletons(12);
grid.events.addEventListener("failed", (event) => showError(event.detail));
start().then(() => state.info && folders.start());
