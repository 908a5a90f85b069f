// The page's words in every language, and the functions that choose them.

const WORDS = {
  // key: [English, German]
  skip: ["Skip to the results", "Zu den Ergebnissen"],
  search: ["Search", "Suchen"],
  searchByWords: ["Search by words", "Mit Worten suchen"],
  searchByImage: ["Search by an image", "Mit einem Bild suchen"],
  describe: ["Describe an image", "Ein Bild beschreiben"],
  describeOrDrop: ["Describe an image, or drop one here", "Ein Bild beschreiben oder hier ablegen"],
  addWords: ["Add words, if you like", "Worte dazu, wenn Sie mögen"],
  removeImage: ["Remove the image", "Bild entfernen"],
  filters: ["Filters", "Filter"],
  kind: ["Kind", "Art"],
  all: ["All", "Alles"],
  image: ["Images", "Bilder"],
  page: ["Pages", "Seiten"],
  video: ["Videos", "Videos"],
  text: ["Texts", "Texte"],
  without: ["Without", "Ohne"],
  withoutExample: ["words to avoid", "unerwünschte Worte"],
  folder: ["Folder", "Ordner"],
  anyFolder: ["any folder", "jeder Ordner"],
  from: ["From", "Von"],
  to: ["To", "Bis"],
  clear: ["Clear", "Leeren"],
  results: ["Results", "Ergebnisse"],
  loading: ["Loading…", "Lädt …"],
  searching: ["Searching…", "Sucht …"],
  inIndex: ["{n} items in the index", "{n} Einträge im Index"],
  inIndexOne: ["1 item in the index", "1 Eintrag im Index"],
  shortened: ["The first {n} can be scrolled to; search or filter for the others.", "Die ersten {n} sind durch Blättern erreichbar, die übrigen durch Suche und Filter."],
  withFilters: ["{n} items with these filters", "{n} Einträge mit diesen Filtern"],
  withFiltersOne: ["1 item with these filters", "1 Eintrag mit diesen Filtern"],
  empty: ["The index is empty. Add images with {command}.", "Der Index ist leer. Bilder kommen mit {command} dazu."],
  nearest: ["Best first: {query}", "Das Beste zuerst: {query}"],
  nothingLike: ["Nothing like that here. Nearest to {query} all the same:", "Nichts dergleichen hier. Am nächsten an {query} liegt:"],
  noHits: ["Nothing found for {query}.", "Nichts gefunden zu {query}."],
  noHitsFilters: ["Nothing found for {query} with these filters.", "Mit diesen Filtern nichts gefunden zu {query}."],
  likeItem: ["like {name}", "wie {name}"],
  notWords: ["without “{words}”", "ohne „{words}“"],
  quoted: ["“{words}”", "„{words}“"],
  pastedImage: ["pasted image", "eingefügtes Bild"],
  notMedia: ["{name} is not an image, a video or a PDF document.", "{name} ist kein Bild, kein Video und kein PDF-Dokument."],
  onlyAsk: ["Videos and documents can be asked about; searching takes an image.", "Zu Videos und Dokumenten kann man fragen; gesucht wird mit einem Bild."],
  broken: ["The file is gone or unreadable", "Die Datei fehlt oder ist unlesbar"],
  noServer: ["The server does not answer. Is visavis still running in the terminal?", "Der Server antwortet nicht. Läuft visavis noch im Terminal?"],
  serverStatus: ["The server answered {status}.", "Der Server antwortete mit {status}."],
  close: ["Close", "Schließen"],
  cancel: ["Cancel", "Abbrechen"],
  previous: ["Previous result", "Vorheriges Ergebnis"],
  next: ["Next result", "Nächstes Ergebnis"],
  panel: ["Item and chat", "Eintrag und Gespräch"],
  moreLikeThis: ["More like this", "Mehr davon"],
  where: ["Where it looked", "Wo es hinsah"],
  whereSearching: ["Looking again, with parts covered…", "Sieht noch einmal hin, mit verdeckten Teilen …"],
  whereLegend: ["Bright parts are what made it match {query}.", "Helle Teile sind der Grund, warum es zu {query} passt."],
  whereNothing: ["No part of it stands out for {query}.", "Kein Teil sticht bei {query} hervor."],
  openFile: ["Open the file", "Datei öffnen"],
  foundText: ["Text found in it", "Darin gefundener Text"],
  pageOf: ["Page {page}", "Seite {page}"],
  moment: ["{begin} to {end}", "{begin} bis {end}"],
  score: ["Cosine similarity, from -1 to 1", "Kosinus-Ähnlichkeit, von -1 bis 1"],
  whyScore: ["Similarity {score}", "Ähnlichkeit {score}"],
  whyWords: ["words found: {words}", "gefundene Worte: {words}"],
  notInIndex: ["Only in this browser; not in the index.", "Nur in diesem Browser, nicht im Index."],
  conversation: ["Conversation", "Gespräch"],
  ask: ["Ask", "Fragen"],
  stop: ["Stop", "Stopp"],
  askAbout: ["Ask about it", "Etwas dazu fragen"],
  attachImage: ["Add an image to the question", "Der Frage ein Bild beifügen"],
  attachedImages: ["Images of the next question", "Bilder der nächsten Frage"],
  noAnswer: ["(no answer)", "(keine Antwort)"],
  stopped: ["(stopped)", "(angehalten)"],
  speed: ["{tokens} tokens in {seconds} s", "{tokens} Tokens in {seconds} s"],
  speedCut: ["{tokens} tokens in {seconds} s, cut at the limit", "{tokens} Tokens in {seconds} s, an der Grenze abgeschnitten"],
  copy: ["Copy", "Kopieren"],
  copied: ["Copied", "Kopiert"],
  model: ["Model: {name}.", "Modell: {name}."],
  local: ["Everything runs on this computer; nothing leaves it.", "Alles läuft auf diesem Rechner; nichts verlässt ihn."],
  keys: ["Keys", "Tasten"],
  language: ["Language", "Sprache"],
  keySlash: ["to the search field", "zum Suchfeld"],
  keyArrows: ["through the results", "durch die Ergebnisse"],
  keyEnds: ["first and last result", "erstes und letztes Ergebnis"],
  keyEnter: ["open the result", "Ergebnis öffnen"],
  keyEscape: ["close the result", "Ergebnis schließen"],
  keyAsk: ["send the question; with Shift a new line", "Frage senden; mit Umschalt eine neue Zeile"],
  keyPaste: ["search with the image on the clipboard", "mit dem Bild der Zwischenablage suchen"],
  keyHelp: ["this list", "diese Liste"],
  dropSearch: ["Search with it", "Damit suchen"],
  dropAsk: ["Ask about it", "Etwas dazu fragen"],
  addFolder: ["Add a folder", "Ordner hinzufügen"],
  addFolderHelp: [
    "Images, PDF documents and videos in it are added to the index; known files are skipped.",
    "Bilder, PDF-Dokumente und Videos darin kommen in den Index; Bekanntes wird übersprungen.",
  ],
  allowedFolder: ["Allowed folder", "Erlaubter Ordner"],
  subfolder: ["Folder inside it (optional)", "Ordner darin (freiwillig)"],
  add: ["Add", "Hinzufügen"],
  indexing: ["Indexing", "Indexieren"],
  scanning: ["Looking through {folder}…", "{folder} wird durchgesehen …"],
  indexed: ["{folder}: {done} of {total} files", "{folder}: {done} von {total} Dateien"],
  added: [
    "{folder}: {added} added, {changed} changed, {unchanged} known, {failed} unreadable",
    "{folder}: {added} neu, {changed} geändert, {unchanged} bekannt, {failed} unlesbar",
  ],
  addStopped: ["{folder}: stopped after {done} of {total} files", "{folder}: angehalten nach {done} von {total} Dateien"],
  details: ["Details", "Einzelheiten"],
  leftOut: ["{n} × {suffix}: {reason}", "{n} × {suffix}: {reason}"],
};

export const LANGUAGES = { en: "English", de: "Deutsch" };
const codes = Object.keys(LANGUAGES);
const kept = stored(() => localStorage.getItem("language"));
const wanted = [kept, ...navigator.languages.map((code) => code.slice(0, 2))];
export let language = wanted.find((code) => codes.includes(code)) ?? "en";

/** Return the words of a key, with {names} filled in. */
export function t(key, values = {}) {
  const words = WORDS[key][codes.indexOf(language)];
  return words.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** Return the words of a key as nodes; values that are nodes stay nodes. */
export function nodes(key, values) {
  const words = WORDS[key][codes.indexOf(language)];
  return words.split(/(\{\w+\})/).map((part) => values[part.slice(1, -1)] ?? part);
}

/** Return the words for a number of things; the key with "One" is the singular. */
export function count(key, n) {
  return n === 1 ? t(`${key}One`) : t(key, { n: number(n) });
}

/** Return a number as the language writes it. */
export function number(value, digits = 0) {
  const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return (value + 0).toLocaleString(language, options);
}

/** Return a date and time as the language writes them. */
export function date(iso) {
  const found = new Date(iso);
  return isNaN(found) ? iso : found.toLocaleDateString(language, { dateStyle: "medium" });
}

/** Put the words into every element that names a key. */
export function translate() {
  document.documentElement.lang = language;
  const attributes = { t: null, tLabel: "aria-label", tTitle: "title", tPlaceholder: "placeholder" };
  for (const [name, attribute] of Object.entries(attributes)) {
    const written = name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
    for (const element of document.querySelectorAll(`[data-${written}]`)) {
      const words = t(element.dataset[name]);
      if (attribute) element.setAttribute(attribute, words);
      else element.textContent = words;
    }
  }
}

export function chooseLanguage(code) {
  language = code;
  stored(() => localStorage.setItem("language", code));
  translate();
}

/** Use the browser's storage, which its settings may forbid. */
function stored(use) {
  try {
    return use();
  } catch {
    return null;
  }
}
