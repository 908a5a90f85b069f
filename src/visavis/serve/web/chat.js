// The conversation about an item or file: streamed answers, more images, stop, copy.

import { $, button, element, events as eventsOf, request } from "./api.js";
import { isMedia, state } from "./search.js";
import { number, t } from "./strings.js";

// Asked in English in every language: small models understand nothing else.
const PROPOSALS = ["What is in this image?", "Describe the image in one sentence."];

let subject = null; // {item} or {file, url, name}
let turns = []; // {role, text, images: [{item}, {file}, …]}
let attached = []; // files of the next question
let answering = null; // AbortController of the running answer
export const events = new EventTarget(); // "where" with the words of an answer

/** Begin a conversation about an item or a file. */
export function about(next) {
  stop();
  [subject, turns, attached] = [next, [], []];
  $("log").replaceChildren();
  showAttached();
  const pills = PROPOSALS.map((question) => button("pill", question, () => ask(question)));
  $("proposals").replaceChildren(...pills);
  $("chat").hidden = !state.info?.chat;
  $("proposals").hidden = $("chat").hidden || Boolean(subject.item && !subject.item.image);
  $("question").value = "";
}

export function stop() {
  answering?.abort();
  answering = null;
  $("send").textContent = t("ask");
}

async function ask(question) {
  if (!question || answering) return;
  const own = turns; // the panel may show something else when the answer ends
  const running = (answering = new AbortController());
  const images = attached.map((file) => ({ file }));
  if (!own.length) images.unshift(subject.item ? { item: subject.item.id } : { file: subject.file });
  own.push({ role: "user", text: question, images });
  attached = [];
  showAttached();
  $("question").value = "";
  $("proposals").hidden = true;
  $("send").textContent = t("stop");
  $("log").append(userTurn(question, images.filter((image) => image.file && image.file !== subject.file)));
  const answer = element("div", "turn assistant thinking");
  answer.setAttribute("aria-busy", "true"); // read out when it is whole, not piece by piece
  $("log").append(answer);
  scrollToEnd();
  let text = "";
  try {
    const options = { method: "POST", body: body(own), signal: running.signal };
    for await (const event of eventsOf(await request("/page/chat", options))) {
      if (event.error) throw new Error(event.error);
      if (event.piece) {
        text += event.piece;
        answer.textContent = text.trimStart();
      }
      if (event.done) $("log").append(note(event, text.trim()));
      scrollToEnd();
    }
    if (!text) answer.textContent = t("noAnswer");
  } catch (error) {
    if (error.name !== "AbortError") {
      answer.classList.add("failed");
      answer.textContent = error.message;
      text = "";
    } else if (!text) answer.textContent = t("stopped");
  }
  answer.classList.remove("thinking");
  answer.removeAttribute("aria-busy");
  // A question without an answer would confuse the next one.
  if (text) own.push({ role: "assistant", text, images: [] });
  else own.pop();
  if (answering === running) stop();
}

/** Return the request: the turns, and the files that they name by number. */
function body(own) {
  const made = new FormData();
  let files = 0;
  const named = (image) => {
    if (image.item !== undefined) return image;
    made.append("file", image.file);
    return { file: files++ };
  };
  const messages = own.map((turn) => ({ ...turn, images: turn.images.map(named) }));
  made.set("messages", JSON.stringify(messages));
  return made;
}

function userTurn(question, images) {
  const made = element("div", "turn user");
  for (const { file } of images) made.append(thumbnail(file));
  made.append(element("span", "", question));
  return made;
}

function thumbnail(file) {
  if (!file.type.startsWith("image/")) return element("span", "file", file.name);
  const image = element("img");
  image.src = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(image.src);
  image.alt = file.name;
  return image;
}

function note({ done, tokens, seconds }, text) {
  const made = element("div", "note");
  const values = { tokens: number(tokens), seconds: number(seconds, 1) };
  made.append(element("span", "", t(done === "length" ? "speedCut" : "speed", values)));
  if (navigator.clipboard && text) {
    const copy = button("plain", t("copy"), async () => {
      await navigator.clipboard.writeText(text);
      copy.textContent = t("copied");
      setTimeout(() => (copy.textContent = t("copy")), 1500);
    });
    made.append(copy);
  }
  const canLook = subject.item ? subject.item.image : subject.file.type.startsWith("image/");
  if (state.info?.where && canLook && text) {
    const where = button("plain", t("where"), () => events.dispatchEvent(new CustomEvent("where", { detail: text })));
    made.append(where);
  }
  return made;
}

function showAttached() {
  const entry = (file) => {
    const made = element("li");
    const remove = button("plain", "✕", () => {
      attached = attached.filter((other) => other !== file);
      showAttached();
      $("question").focus();
    });
    remove.setAttribute("aria-label", `${t("removeImage")}: ${file.name}`);
    made.append(thumbnail(file), remove);
    return made;
  };
  $("attached").replaceChildren(...attached.map(entry));
  $("attached").hidden = !attached.length;
}

/** Add files to the next question; return whether all are images, videos or documents. */
export function attach(files) {
  const usable = [...files].filter(isMedia);
  attached = [...attached, ...usable];
  showAttached();
  $("question").focus();
  return usable.length === files.length;
}

export function translated() {
  $("send").textContent = t(answering ? "stop" : "ask");
}

function scrollToEnd() {
  $("panel-body").scrollTop = $("panel-body").scrollHeight;
}

$("chat").onsubmit = (event) => {
  event.preventDefault();
  if (answering) answering.abort();
  else ask($("question").value.trim());
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!answering) ask($("question").value.trim());
  }
};
$("chat-file").onchange = () => {
  attach($("chat-file").files);
  $("chat-file").value = "";
};
