"use strict";
// Sorting, the dialog of a record, the filter of claims. The page is whole without any of them.

function make(tag, text, parent, attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text; // never as HTML: reasons and logs are arbitrary text
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

// --- sorting: a first click ascends, a second descends; holes stay last ---

function keyOf(row, column) {
  const cell = row.children[column];
  const text = cell.dataset.sort ?? cell.textContent.trim();
  return { text, number: text === "" ? NaN : Number(text) };
}

function compare(a, b) {
  if (!Number.isNaN(a.number) && !Number.isNaN(b.number)) return a.number - b.number;
  return a.text.localeCompare(b.text, "en", { numeric: true });
}

function sortBy(header) {
  const table = header.closest("table");
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, key: keyOf(row, header.cellIndex) }));
  rows.sort((a, b) => {
    const holes = (a.key.text === "") - (b.key.text === "");
    return holes || (descending ? compare(b.key, a.key) : compare(a.key, b.key));
  });
  body.append(...rows.map(({ row }) => row));
}

// --- the dialog ---

function show(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(6)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function list(pairs, parent) {
  const kept = pairs.filter(([, value]) => show(value) !== "");
  if (!kept.length) return;
  const terms = make("dl", "", parent);
  for (const [name, value] of kept) {
    make("dt", name, terms);
    make("dd", show(value), terms);
  }
}

function part(heading, parent) {
  make("h3", heading, parent);
  return parent;
}

function grid(heading, names, rows, parent) {
  if (!rows?.length) return;
  const attributes = { class: "scroll", tabindex: "0", role: "region", "aria-label": heading };
  const table = make("table", "", make("div", "", part(heading, parent), attributes));
  const head = make("tr", "", make("thead", "", table));
  for (const name of names) make("th", name, head, { scope: "col" });
  const body = make("tbody", "", table);
  for (const [name, ...values] of rows) {
    const row = make("tr", "", body);
    make("th", name, row, { scope: "row" });
    for (const value of values) make("td", show(value), row, { class: typeof value === "string" ? "text" : "number" });
  }
}

function describe(record, body) {
  part("Record", body);
  const keys = ["status", "reason", "kind", "model", "method", "seed", "command", "protocol", "git_commit"];
  list(keys.map((key) => [key.replace("git_commit", "git commit"), record[key]]), body);
  const line = make("p", "", body);
  if (record.href) make("a", record.path, line, { href: record.href });
  else make("code", record.path, line);
  make("pre", record.rerun, part("Run it again", body), { tabindex: "0" });
  grid("Measurements", ["name", "value", "standard error", "n", "chance"], record.measurements, body);
  for (const [name, heading] of [
    ["inputs", "Inputs, SHA-256"], ["versions", "Versions"], ["host", "Host"],
    ["provenance", "Further provenance"], ["details", "Details"],
  ]) {
    const pairs = Object.entries(record[name] ?? {});
    if (pairs.length) list(pairs, part(heading, body));
  }
  part("End of the log", body);
  if (record.log.length) make("pre", record.log.join("\n"), body, { tabindex: "0" });
  else make("p", `No log at ${record.log_path}.`, body);
}

function recordOf(path) {
  const found = path && document.querySelector(`script[data-path="${CSS.escape(path)}"]`);
  return found ? JSON.parse(found.textContent) : null;
}

function open(button) {
  const about = button.dataset.about ? JSON.parse(button.dataset.about) : { facts: [], record: button.dataset.record };
  const record = recordOf(about.record);
  const body = document.getElementById("dialog-body");
  body.replaceChildren();
  document.getElementById("dialog-title").textContent = about.title ?? `${record.method}, ${record.kind}`;
  list(about.facts, body);
  grid("Comparisons", ["comparison", "model", "ours", "compared with", "outcome", "reason"], about.comparisons, body);
  const records = about.records?.length ? make("ul", "", part("Records", body)) : null;
  for (const path of about.records ?? []) {
    make("button", path, make("li", "", records), { type: "button", class: "cell", "data-record": path });
  }
  if (record) describe(record, body);
  else if (!records) make("p", "No record stands behind it.", body);
  const dialog = document.getElementById("dialog");
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

document.addEventListener("click", (event) => {
  const dialog = document.getElementById("dialog");
  if (event.target === dialog) return dialog.close(); // beside it
  const button = event.target.closest("button");
  if (button?.matches(".cell")) open(button);
  else if (button?.closest(".sortable thead")) sortBy(button.closest("th"));
});

// --- the filter of claims ---

const filter = document.getElementById("verdict-filter");
filter?.addEventListener("change", () => {
  const rows = [...document.querySelectorAll("#claims tr[data-verdict]")];
  for (const row of rows) row.hidden = filter.value !== "" && row.dataset.verdict !== filter.value;
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("verdict-shown").textContent = `${shown} of ${rows.length} shown`;
});
