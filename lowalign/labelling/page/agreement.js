"use strict";

const $ = (id) => document.getElementById(id);
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function figure(value, text) {
  return make("div", "figure", make("b", "", value), make("span", "", text));
}

function table(title, columns, rows) {
  if (!rows.length) return [];
  const cells = (tag, row) => make("tr", "", ...row.map((cell, i) => make(tag, i ? "n" : "", String(cell))));
  const whole = make("table", "", make("thead", "", cells("th", columns)), make("tbody", "", ...rows.map((row) => cells("td", row))));
  return [make("h2", "", title), make("div", "scroll", whole)];
}

function disagreement(one) {
  const names = { a: "first", b: "second", tie: "equal" };
  const answer = (label, text) => make("div", "", make("div", "role", label), make("div", "text", text));
  const votes = Object.entries(one.verdicts).map(([name, verdict]) => `${name}: ${names[verdict]}`);
  return make(
    "article",
    "case",
    make("div", "source", one.source),
    make("div", "text", one.prompt),
    make("div", "two", answer("first", one.a), answer("second", one.b)),
    make("p", "votes", votes.join(" · "))
  );
}

async function main() {
  document.querySelector("nav a").href = `./${location.hash}`;
  let found;
  try {
    found = await (await fetch("figures")).json();
  } catch {
    $("figures").append(make("p", "", "No answer from lowalign label. Start it again and open its new address."));
    return;
  }
  const all = found.all;
  $("figures").append(
    figure(percent(all.agreement), "equal among two verdicts on the same answers"),
    figure(all.alpha === null ? "–" : all.alpha.toFixed(2), "Krippendorff's alpha (1 always agreed, 0 as by chance)"),
    figure(String(all.verdicts), `verdicts of ${all.annotators} annotators on ${all.pairs} pairs of answers`)
  );
  $("tables").append(
    ...table(
      "Annotators",
      ["name", "judged", "skipped", "edited", "equal", "first shown wins", "longer wins"],
      found.annotators.map((one) => [one.name, one.judged, one.skipped, one.edited, percent(one.ties), percent(one.first_shown), percent(one.longer)])
    ),
    ...table("Every two annotators", ["names", "verdicts of both", "equal"], found.pairs.map((one) => [one.names.join(", "), one.verdicts, percent(one.agreement)])),
    ...table("Policies", ["policy", "verdicts", "won"], found.policies.map((one) => [one.name, one.verdicts, percent(one.won)]))
  );
  if (found.disagreements.length) $("cases").append(make("h2", "", "Disagreements"), ...found.disagreements.map(disagreement));
}

main();
