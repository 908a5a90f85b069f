// The page's behaviour: search, look at a picture, chat about it. No framework, no build step.

const $ = (id) => document.getElementById(id);
const state = {
  attached: null, // {file, url, name}: the picture that is searched with
  subject: null, // {item} or {file, url, name}: what the panel shows
  turns: [], // the conversation: {role, text}
  opener: null, // what had the focus before the panel opened
  searching: null, // AbortController of the running search
  answering: null, // AbortController of the running answer
};

// --- talking to the server -----------------------------------------------------------------------

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is visavis still running in the terminal?");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    const error = new Error(body.error ?? `The server answered ${response.status}.`);
    error.unreadable = response.status === 415; // the picture, not the server, is the trouble
    throw error;
  }
  return response;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const complete = waiting.split("\n\n");
    waiting = complete.pop();
    for (const event of complete) yield JSON.parse(event.replace(/^data: /, ""));
  }
}

// --- the grid ------------------------------------------------------------------------------------

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function tile(item) {
  const entry = element("li");
  const button = element("button", "hit");
  button.type = "button";
  const frame = element("span", "frame");
  if (item.image) {
    const picture = element("img");
    picture.src = `${item.image}&size=400`;
    picture.alt = ""; // the name stands below it
    picture.loading = "lazy";
    picture.decoding = "async";
    picture.onerror = () => frame.replaceChildren(element("span", "broken", "The file is gone or unreadable"));
    frame.append(picture);
  } else {
    frame.append(element("span", "words", item.text));
  }
  const line = element("span", "line");
  line.append(element("span", "name", item.name));
  if (item.score !== undefined) {
    const score = element("span", "score", (Math.round(item.score * 100) / 100 + 0).toFixed(2));
    score.title = "Cosine similarity, from -1 to 1";
    line.append(score);
  }
  button.append(frame, line);
  button.onclick = () => openPanel({ item }, button);
  entry.append(button);
  return entry;
}

function showTiles(items) {
  $("hits").classList.remove("waiting");
  $("hits").replaceChildren(...items.map(tile));
}

function showSkeletons() {
  const skeletons = Array.from({ length: 8 }, () => {
    const entry = element("li", "skeleton");
    entry.append(element("span", "hit"));
    entry.firstChild.append(element("span", "frame"));
    return entry;
  });
  $("hits").replaceChildren(...skeletons);
}

function say(...parts) {
  $("status").replaceChildren(...parts);
}

function showError(error) {
  $("error").textContent = error?.message ?? "";
  $("error").hidden = !error;
}

// --- searching -----------------------------------------------------------------------------------

async function search({ like } = {}) {
  const text = $("text").value.trim();
  if (!text && !state.attached && !like) return start();
  state.searching?.abort();
  const running = (state.searching = new AbortController());
  const form = new FormData();
  if (like) {
    form.set("like", like.id);
  } else {
    form.set("text", text);
    if (state.attached) form.set("image", state.attached.file);
  }
  showError(null);
  say("Searching…");
  $("hits").classList.add("waiting");
  try {
    const options = { method: "POST", body: form, signal: running.signal };
    const { hits, nothing_similar: nothing } = await (await request("/page/search", options)).json();
    const meant = element("b", "", like ? `similar to ${like.name}` : searchedFor(text));
    if (nothing) say("Nothing like that here. Nearest to ", meant, " all the same:");
    else if (hits.length) say("Nearest first: ", meant);
    else say("Nothing found for ", meant, ". The index is empty: add pictures with “visavis index add”.");
    showTiles(hits);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("hits").classList.remove("waiting");
    say();
    if (error.unreadable) detach();
    showError(error);
  }
}

function searchedFor(text) {
  const parts = [];
  if (state.attached) parts.push(state.attached.name);
  if (text) parts.push(`“${text}”`);
  return parts.join(" + ");
}

const canDrop = matchMedia("(hover: hover) and (min-width: 46rem)").matches;
const placeholder = canDrop ? "Describe a picture, or drop one here" : "Describe a picture";

function attach(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    showError(new Error(`${file.name} is not a picture.`));
    return;
  }
  detach();
  const url = URL.createObjectURL(file);
  state.attached = { file, url, name: file.name || "pasted picture" };
  $("chip-picture").src = url;
  $("chip-name").textContent = state.attached.name;
  $("chip").hidden = false;
  $("text").value = ""; // words of an earlier search; new ones may be added
  $("text").placeholder = "Add words, if you like";
  search();
}

function detach() {
  state.attached = null;
  $("chip").hidden = true;
  $("file").value = "";
  $("text").placeholder = placeholder;
}

// --- the panel -----------------------------------------------------------------------------------

function openPanel(subject, opener) {
  stopAnswer();
  state.subject = subject;
  state.turns = [];
  state.opener = opener;
  const { item } = subject;
  const name = item?.name ?? subject.name;
  $("panel-name").textContent = name;
  $("panel-picture").hidden = item ? !item.image : false;
  if (item?.image) $("panel-picture").src = `${item.image}&size=1200`;
  else if (!item) $("panel-picture").src = subject.url;
  $("panel-picture").alt = name;
  $("panel-source").textContent = item?.source ?? "Only in this browser; not in the index.";
  $("panel-similar").hidden = !item?.image;
  $("log").replaceChildren();
  $("proposals").hidden = false;
  $("chat").hidden = Boolean(item && !item.image);
  $("proposals").hidden = $("chat").hidden;
  $("panel").hidden = false;
  $("panel-body").scrollTop = 0;
  markCurrent();
  $("panel-name").focus({ preventScroll: true });
}

function closePanel() {
  if ($("panel").hidden) return;
  stopAnswer();
  state.subject = null;
  $("panel").hidden = true;
  markCurrent();
  if (state.opener?.isConnected) state.opener.focus();
  else $("text").focus();
}

function markCurrent() {
  for (const button of document.querySelectorAll(".hit")) {
    button.setAttribute("aria-current", String(button === state.opener && !$("panel").hidden));
  }
}

// --- chatting ------------------------------------------------------------------------------------

function stopAnswer() {
  state.answering?.abort();
  state.answering = null;
  $("send").textContent = "Ask";
}

async function ask(question) {
  if (!question || state.answering) return;
  const { subject, turns } = state; // the panel may show another picture when the answer ends
  const running = (state.answering = new AbortController());
  turns.push({ role: "user", text: question });
  $("question").value = "";
  $("proposals").hidden = true;
  $("send").textContent = "Stop";
  $("log").append(element("div", "turn user", question));
  const answer = element("div", "turn assistant thinking");
  $("log").append(answer);
  scrollToEnd();

  const form = new FormData();
  form.set("messages", JSON.stringify(turns));
  if (subject.item) form.set("like", subject.item.id);
  else form.set("image", subject.file);
  let text = "";
  try {
    const options = { method: "POST", body: form, signal: running.signal };
    for await (const event of events(await request("/page/chat", options))) {
      if (event.error) throw new Error(event.error);
      if (event.piece) {
        text += event.piece;
        answer.textContent = text.trimStart();
      }
      if (event.done) noteSpeed(event);
      scrollToEnd();
    }
    if (!text) answer.textContent = "(no answer)";
  } catch (error) {
    if (error.name !== "AbortError") {
      answer.classList.add("failed");
      answer.textContent = error.message;
      text = "";
    } else if (!text) answer.textContent = "(stopped)";
  }
  answer.classList.remove("thinking");
  // A question without an answer would confuse the next one.
  if (text) turns.push({ role: "assistant", text });
  else turns.pop();
  if (state.answering === running) stopAnswer();
}

function noteSpeed({ done, tokens, seconds }) {
  const cut = done === "length" ? ", cut at the limit" : "";
  $("log").append(element("div", "note", `${tokens} tokens in ${seconds.toFixed(1)} s${cut}`));
}

function scrollToEnd() {
  $("panel-body").scrollTop = $("panel-body").scrollHeight;
}

// --- wiring --------------------------------------------------------------------------------------

$("search").onsubmit = (event) => {
  event.preventDefault();
  search();
};
$("file").onchange = () => attach($("file").files[0]);
$("chip-remove").onclick = () => {
  detach();
  $("text").focus();
  search();
};
$("chip-ask").onclick = () => openPanel({ ...state.attached }, $("chip-ask"));
$("panel-close").onclick = closePanel;
$("panel-similar").onclick = () => {
  const { item } = state.subject;
  $("text").value = "";
  detach();
  search({ like: item });
};
$("chat").onsubmit = (event) => {
  event.preventDefault();
  if (state.answering) state.answering.abort();
  else ask($("question").value.trim());
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!state.answering) ask($("question").value.trim());
  }
};
for (const pill of $("proposals").children) pill.onclick = () => ask(pill.textContent);

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea");
  if (event.key === "Escape") closePanel();
  else if (event.key === "/" && !typing) {
    event.preventDefault();
    $("text").focus();
  } else if (event.target.classList?.contains("hit")) moveInGrid(event);
});

function moveInGrid(event) {
  const tiles = [...document.querySelectorAll("button.hit")];
  const columns = getComputedStyle($("hits")).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const next = step && tiles[tiles.indexOf(event.target) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
}

let dragDepth = 0; // dragenter and dragleave also fire for every child that is crossed
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => {
  if (hasFiles(event)) $("drop").hidden = ++dragDepth === 0;
});
document.addEventListener("dragleave", (event) => {
  if (hasFiles(event)) $("drop").hidden = --dragDepth <= 0;
});
document.addEventListener("dragover", (event) => {
  if (hasFiles(event)) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  dragDepth = 0;
  $("drop").hidden = true;
  attach(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const picture = [...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/"));
  if (picture) {
    event.preventDefault();
    attach(picture);
  }
});

async function start() {
  showError(null);
  showSkeletons();
  say("Loading…");
  try {
    const info = await (await request("/page/info")).json();
    const count = info.num_items === 1 ? "1 picture" : `${info.num_items} pictures`;
    const shown = info.items.length < info.num_items ? `, here the first ${info.items.length}` : "";
    if (info.num_items) say(`${count} in the index${shown}.`);
    else say("The index is empty. Add pictures with ", element("b", "", "visavis index add"), ".");
    $("about").textContent = `Model: ${info.model}.`;
    const pills = info.examples.map((words) => {
      const pill = element("button", "pill", words);
      pill.type = "button";
      pill.onclick = () => {
        detach();
        $("text").value = words;
        search();
      };
      return pill;
    });
    $("examples").replaceChildren(...pills);
    showTiles(info.items);
  } catch (error) {
    say();
    $("hits").replaceChildren();
    showError(error);
  }
}

$("text").placeholder = placeholder;
start();
