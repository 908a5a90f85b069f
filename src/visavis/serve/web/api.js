// Requests to the server, and small helpers that every module needs.

import { t } from "./strings.js";

export const $ = (id) => document.getElementById(id);

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function button(className, text, onclick) {
  const made = element("button", className, text);
  made.type = "button";
  made.onclick = onclick;
  return made;
}

/** Fetch; an answer that is no success is thrown as an Error in words. */
export async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(t("noServer"));
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    const error = new Error(body.error ?? t("serverStatus", { status: response.status }));
    error.unreadable = response.status === 415; // the image, not the server, is the trouble
    throw error;
  }
  return response;
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

/** Yield the server-sent events of a response. */
export async function* events(response) {
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

export function form(fields) {
  const made = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== undefined && value !== null && value !== "") made.set(name, value);
  }
  return made;
}

/** Return seconds as 1:05 or 1:02:05. */
export function clock(seconds) {
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (!parts[0]) parts.shift();
  return parts.map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":");
}

export function showError(error) {
  $("error").textContent = error?.message ?? "";
  $("error").hidden = !error;
}
