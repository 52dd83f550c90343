"use strict";

const LETTERS = "ABCDEFGHI";
const $ = (id) => document.getElementById(id);
let annotator = "";
let shown = null; // what the server said last
let order = []; // rank: places in the order of preference, ties together: [[2], [0, 1]]
let ratings = []; // rate: by place
let at = 0; // rate: the place that the next number is for
let edit = null; // {answer, text} that was saved
let editing = null; // the place whose text is being edited
let choosingEdit = false; // E was pressed, and a letter or number says which answer
let busy = false;

function make(tag, properties = {}, ...children) {
  const { className, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const key = (text) => make("kbd", { textContent: text });
const count = () => (shown && shown.item ? shown.item.answers.length : 0);

let messageTimer = 0;
function say(text, bad = false) {
  clearTimeout(messageTimer);
  $("message").textContent = text;
  $("message").classList.toggle("bad", bad);
  $("message").hidden = !text;
  if (text && !bad) messageTimer = setTimeout(() => say(""), 2500);
}

async function post(path, body) {
  busy = true;
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ annotator, ...body }),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    say(answer.repeated ? "This one was judged already, in another window." : "");
    return answer;
  } catch (error) {
    const lost = error instanceof TypeError || error instanceof SyntaxError;
    say(lost ? "No answer from lowalign label. What you judged before is saved. Start it again and open its new address." : error.message, true);
    return null;
  } finally {
    busy = false;
  }
}

async function show(request) {
  const answer = await request;
  if (!answer) return false;
  shown = answer;
  [order, ratings, at, edit, editing, choosingEdit] = [[], [], 0, null, null, false];
  draw();
  window.scrollTo(0, 0);
  return true;
}

// -- what the keys and buttons do --

function send(ranks, more = {}) {
  if (!busy && shown && shown.item) show(post("judge", { item: shown.item.key, ranks, edit, ...more }));
}

function pick(place) {
  if (shown.mode === "pick") send(shown.item.answers.map((_, i) => (place === null || i === place ? 1 : 2)));
  else if (shown.mode === "rank" && place === null) send(shown.item.answers.map(() => 1));
  else if (shown.mode === "rank") {
    const before = order.length;
    order = order.map((places) => places.filter((i) => i !== place)).filter((places) => places.length);
    if (order.length === before && !order.some((places) => places.includes(place))) order.push([place]);
    draw();
  } else if (shown.mode === "rate" && place !== null) {
    at = place;
    draw();
  }
}

function tieLast() {
  if (shown.mode !== "rank" || order.length < 2) return;
  const last = order.pop();
  order[order.length - 1].push(...last);
  draw();
}

function rate(place, value) {
  ratings[place] = value;
  const open = shown.item.answers.findIndex((_, i) => !ratings[i]);
  at = open < 0 ? place : open;
  draw();
}

function ready() {
  if (shown.mode === "rank") return order.flat().length === count();
  return shown.mode === "rate" && shown.item.answers.every((_, i) => ratings[i]);
}

function submit() {
  if (!ready()) return;
  if (shown.mode === "rank") {
    const ranks = [];
    order.forEach((places, rank) => places.forEach((i) => (ranks[i] = rank + 1)));
    send(ranks);
  } else {
    const levels = [...new Set(ratings)].sort((a, b) => b - a);
    send(ratings.map((value) => levels.indexOf(value) + 1), { ratings });
  }
}

function skip() {
  if (!busy && shown && shown.item) show(post("judge", { item: shown.item.key, skip: true }));
}

function undo() {
  if (!busy && shown && shown.can_undo) show(post("undo", {}));
}

function chooseEdit(choosing) {
  choosingEdit = choosing;
  draw();
}

function startEdit(place) {
  choosingEdit = false;
  if (!shown.item.answers[place].editable) return say("An answer with tool calls or several turns cannot be edited.");
  editing = place;
  draw();
  const area = document.querySelector("textarea");
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function stopEdit(save) {
  const area = document.querySelector("textarea");
  const place = editing;
  if (save && !area.value.trim()) return say("The edited answer is empty.");
  editing = null;
  const same = area.value === shown.item.answers[place].text;
  if (save && !same) edit = { answer: place, text: area.value };
  else if (save && edit && edit.answer === place) edit = null; // back to the text that is shown
  draw();
  if (save && !same && shown.mode === "pick") pick(place);
}

// -- drawing --

function draw() {
  const item = shown.item;
  const done = shown.judged + shown.skipped;
  $("count").replaceChildren(make("b", { textContent: done }), ` of ${shown.total}`);
  $("progress").style.width = `${(100 * done) / shown.total}%`;
  document.querySelector(".progress").setAttribute("aria-valuenow", Math.round((100 * done) / shown.total));
  $("who").textContent = annotator;
  $("main").hidden = $("actions").hidden = !item;
  $("done").hidden = Boolean(item);
  $("done-text").textContent = `${shown.judged} judged, ${shown.skipped} skipped. Thank you, ${annotator}.`;
  $("undo").disabled = $("done-undo").disabled = !shown.can_undo;
  $("skip").disabled = false;
  for (const link of document.querySelectorAll("a[href^=agreement]")) link.href = `agreement#${encodeURIComponent(annotator)}`;
  if (!item) return;
  $("prompt").replaceChildren(...item.prompt.map(turn));
  $("task").textContent = task();
  $("answers").replaceChildren(...item.answers.map(card));
  $("choices").replaceChildren(...choices());
  if (editing !== null) for (const button of $("actions").querySelectorAll("button")) button.disabled = true;
}

function turn({ role, text }) {
  return make(
    "div",
    { className: `turn ${role}${text.length > 600 ? " long" : ""}` },
    make("div", { className: "role", textContent: role || "prompt" }),
    make("div", { className: "text", textContent: text })
  );
}

function task() {
  if (choosingEdit) return "Which answer do you want to edit? Press its letter or number.";
  if (shown.mode === "pick") return count() === 2 ? "Which answer is better?" : "Which answer is the best?";
  return shown.mode === "rank" ? "Choose the answers from best to worst." : "Rate each answer from 1 (bad) to 5 (excellent).";
}

function card(answer, place) {
  const rank = order.findIndex((places) => places.includes(place));
  const head = make("div", { className: "head" }, make("span", { className: "letter", textContent: LETTERS[place] }));
  if (rank >= 0) head.append(make("span", { className: "badge", textContent: rank ? `${rank + 1}.` : "best" }));
  if (edit && edit.answer === place) head.append(make("span", { className: "badge", textContent: "edited: above all" }));
  const article = make("article", { className: "answer" }, head);
  if (rank === 0) article.classList.add("best");
  if (shown.mode === "rate" && at === place) article.classList.add("at");
  const text = edit && edit.answer === place ? edit.text : answer.text;
  if (editing === place) {
    const buttons = make("div", { className: "save" });
    buttons.append(
      make("button", { type: "button", className: "primary", onclick: () => stopEdit(true) }, "Save as best", key("Ctrl+Enter")),
      make("button", { type: "button", onclick: () => stopEdit(false) }, "Cancel", key("Esc"))
    );
    const label = `Edit answer ${LETTERS[place]}`;
    article.append(make("textarea", { value: text, spellcheck: true, ariaLabel: label }), buttons);
    return article;
  }
  if (answer.editable) {
    head.append(make("button", { type: "button", className: "quiet", onclick: () => startEdit(place), textContent: "Edit", title: `Edit answer ${LETTERS[place]} into a better one` }));
  }
  article.append(make("div", { className: "text", textContent: text }));
  if (shown.mode === "rate") {
    const stars = [1, 2, 3, 4, 5].map((value) =>
      make("button", { type: "button", className: ratings[place] === value ? "on" : "", textContent: value, ariaLabel: `Rate ${LETTERS[place]} ${value}`, onclick: () => rate(place, value) })
    );
    article.append(make("div", { className: "stars" }, ...stars));
  }
  return article;
}

function choices() {
  if (shown.mode === "rate") return [sendButton()];
  const two = count() === 2 && shown.mode === "pick";
  const buttons = shown.item.answers.map((_, i) =>
    make("button", { type: "button", className: two ? "primary" : "", onclick: () => pick(i) }, two ? `${LETTERS[i]} is better` : LETTERS[i], key(i + 1))
  );
  const tie = make("button", { type: "button", onclick: () => pick(null) }, two ? "Equal" : "All equal", key("0"));
  if (two) return [buttons[0], tie, buttons[1]];
  return shown.mode === "pick" ? [...buttons, tie] : [...buttons, tie, sendButton()];
}

function sendButton() {
  return make("button", { type: "button", className: "primary", disabled: !ready(), onclick: submit }, "Save", key("Enter"));
}

// -- keyboard --

function help() {
  const mode = shown ? shown.mode : "pick";
  const last = Math.max(count(), 2);
  const what = { pick: "this answer is the best", rank: "the next best answer; again: take it back", rate: "mark this answer" }[mode];
  const rows = mode === "rate" ? [[["1", "…", "5"], "rating of the marked answer"]] : [[["1", "…", last], what]];
  rows.push([["A", "…", LETTERS[last - 1]], what]);
  if (mode === "rank") rows.push([["="], "the last two chosen are equal"]);
  if (mode !== "rate") rows.push([["0"], "all are equal"]);
  if (mode !== "pick") rows.push([["Enter"], "save"]);
  if (last < 5) rows.push([["E", "1"], "edit answer 1 into a better one"]);
  rows.push([["S"], "skip"], [["U"], "undo the last one"], [["?"], "this list"]);
  $("keys").replaceChildren(...rows.flatMap(([keys, text]) => [make("dt", {}, ...keys.map(key)), make("dd", { textContent: text })]));
  $("help-dialog").showModal();
}

function placeOf(pressed) {
  const place = /^[1-9]$/.test(pressed) ? Number(pressed) - 1 : LETTERS.indexOf(pressed.toUpperCase());
  return pressed.length === 1 && place >= 0 && place < count() ? place : null;
}

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.altKey || event.metaKey) return;
  if (editing !== null) {
    if (event.key === "Escape") stopEdit(false);
    else if (event.key === "Enter" && event.ctrlKey) stopEdit(true);
    return;
  }
  if (event.ctrlKey || event.repeat || !shown) return;
  const pressed = event.key.toLowerCase();
  const place = placeOf(event.key);
  if (event.key === "?") help();
  else if (event.key === "Escape" && choosingEdit) chooseEdit(false);
  else if (pressed === "u") undo();
  else if (!shown.item) return;
  else if (choosingEdit && place !== null) startEdit(place);
  else if (shown.mode === "rate" && /^[1-5]$/.test(event.key)) rate(at, Number(event.key));
  else if (pressed === "e" && count() < 5) chooseEdit(true);
  else if (event.key === "0") pick(null);
  else if (event.key === "=") tieLast();
  else if (pressed === "s") skip();
  else if (place !== null) pick(place);
  else if (event.key === "Enter" && document.activeElement.tagName !== "BUTTON") submit();
  else return;
  event.preventDefault();
});

// -- start --

function askName() {
  $("name").value = annotator;
  $("name-dialog").showModal();
  $("name").select();
}

$("name-dialog").addEventListener("cancel", (event) => annotator || event.preventDefault());
$("name-form").addEventListener("submit", async () => {
  const before = annotator;
  annotator = $("name").value.trim();
  if (await show(post("next", {}))) {
    history.replaceState(null, "", `#${encodeURIComponent(annotator)}`);
  } else {
    annotator = before;
    askName();
  }
});
$("who").onclick = askName;
$("undo").onclick = $("done-undo").onclick = undo;
$("skip").onclick = skip;
$("help-button").onclick = help;

(async () => {
  try {
    annotator = decodeURIComponent(location.hash.slice(1));
  } catch {} // not written by this page
  if (!annotator) annotator = (await (await fetch("start")).json()).annotator;
  if (!annotator || !(await show(post("next", {})))) askName();
})();
