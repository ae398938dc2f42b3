"use strict";
// What a page does in the browser: it remembers its switches in the address (so that a reload, or a link that is sent, shows the
// same), turns light or dark, sorts and filters tables. Texts reach the page as textContent alone, never as HTML.

const state = {
  values: new URLSearchParams(location.hash.slice(1)),
  get(name, usual) { return this.values.get(name) ?? usual; },
  set(name, value, usual) {
    String(value) === String(usual) ? this.values.delete(name) : this.values.set(name, value);
    history.replaceState(null, "", "#" + this.values);
  },
};

function make(tag, attributes, parent, text) {          // an element of HTML, or of SVG where its parent is one
  const space = tag === "svg" || parent?.namespaceURI.endsWith("svg") ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent?.append(element);
  return element;
}

// a labelled control: what it shows is read from the address and written there; act() follows each change
function control(parent, name, text, usual, options, act) {
  const label = make("label", {}, parent, text), tick = typeof usual === "boolean";
  const input = make(Array.isArray(options) ? "select" : "input", { name, ...(tick ? { type: "checkbox" } : Array.isArray(options) ? {} : options) }, label);
  if (Array.isArray(options)) for (const [value, words] of options) make("option", { value }, input, words);
  if (tick) { input.checked = state.get(name, String(usual)) === "true"; label.prepend(input); } else input.value = state.get(name, usual);
  input.addEventListener("input", () => { state.set(name, tick ? input.checked : input.value, usual); act(); });
  return input;
}

// ---- looks: seven colours of Okabe and Ito (without yellow) and five patterns of dashes, so that 35 lines differ, and in grey too
const COLOURS = ["#0072B2", "#E69F00", "light-dark(#000000, #f2f2f2)", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"];
const DASHES = ["", "7 3", "2 2.5", "9 3 2 3", "4 2 1 2 1 2"];
const colour = look => look < 0 ? "var(--soft)" : COLOURS[look % COLOURS.length];
const dashes = look => look < 0 ? "3 3" : DASHES[look % DASHES.length];
const SHAPES = ["M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.5,-3.5h7v7h-7z", "M0,-4.6L4.3,3.4H-4.3z", "M0,-4.8L4.8,0L0,4.8L-4.8,0z", "M0,4.6L4.3,-3.4H-4.3z"];
const shape = look => SHAPES[(look < 0 ? 0 : look) % SHAPES.length];

// ---- tables
const hidden = new Set();                               // data-row of rows that are filtered away or not ticked

function sortTable(table, column, down) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], sign = down ? -1 : 1;
  heads.forEach((head, i) => i === column ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
  const value = row => row.cells[column]?.dataset.value ?? "";
  const compare = (a, b) => {                           // numbers as numbers; what is empty comes last, either way
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
  };
  body.append(...[...body.rows].sort(compare));
}

function setUpTable(box, index) {
  const table = box.querySelector("table"), rows = [...table.tBodies[0].rows], linked = rows.filter(row => row.dataset.row !== undefined);
  const heads = [...table.tHead.rows[0].cells], off = new Set(state.get("off" + index, "").split(" ").filter(Boolean));
  heads.forEach((head, column) => {
    const button = make("button", {}, null);
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      sortTable(table, column, down);
      state.set("sort" + index, column + (down ? "-" : "+"));
    });
  });
  const sorted = /^(\d+)([+-])$/.exec(state.get("sort" + index, ""));
  if (sorted && +sorted[1] < heads.length) sortTable(table, +sorted[1], sorted[2] === "-");
  const bar = make("div", { class: "filter" });
  let filter = null, every = null;
  const apply = () => {
    const words = (filter?.value || "").toLowerCase().split(" ").filter(Boolean);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    for (const row of linked) hidden[row.hidden || off.has(row.dataset.row) ? "add" : "delete"](row.dataset.row);
    if (every) every.checked = linked.every(row => row.hidden || !off.has(row.dataset.row));
    document.dispatchEvent(new Event("rows"));
  };
  const tick = (row, on) => {
    row.querySelector("input").checked = on;
    off[on ? "delete" : "add"](row.dataset.row);
    state.set("off" + index, [...off].join(" "), "");
  };
  for (const row of linked) addTick(row, !off.has(row.dataset.row), on => { tick(row, on); apply(); });
  if (rows.length > 5) {
    filter = control(bar, "filter" + index, "", "", { type: "search", placeholder: "rows that contain these words", "aria-label": "filter rows" }, apply);
    box.before(bar);
  }
  if (linked.length > 1 && filter) {
    every = make("input", { type: "checkbox" }, null);
    make("label", {}, bar).append(every, "all in the chart");
    every.addEventListener("input", () => { linked.filter(row => !row.hidden).forEach(row => tick(row, every.checked)); apply(); });
  }
  apply();
}

function addTick(row, on, act) {                        // a tick and a sample of the line before the name
  const cell = row.cells[0], look = +row.dataset.look, label = make("label", {}), input = make("input", { type: "checkbox" }, label);
  input.checked = on;
  input.addEventListener("input", () => act(input.checked));
  const sample = make("svg", { width: 26, height: 12, "aria-hidden": "true" }, label);
  make("path", { d: "M0,6H26", "stroke-dasharray": dashes(look), "stroke-width": 2.2 }, sample).style.stroke = colour(look);
  make("path", { d: shape(look), transform: "translate(13,6)" }, sample).style.fill = colour(look);
  const name = make("span", {}, label);
  name.append(...[...cell.childNodes].filter(node => node !== label));
  cell.append(label);
}

// ---- the page
function setUpPage() {
  const paint = () => { document.documentElement.style.colorScheme = theme.value === "auto" ? "" : theme.value; };
  const theme = control(document.querySelector("header"), "theme", "colours ", "auto", [["auto", "as the system"], ["light", "light"], ["dark", "dark"]], paint);
  paint();
  document.querySelectorAll("figure.chart").forEach((figure, index) => new Chart(figure, index));
  document.querySelectorAll(".scroll").forEach(setUpTable);
  const seconds = +document.body.dataset.reload;        // while runs go on; not while someone types or draws a zoom
  const busy = () => document.activeElement?.type === "search" || document.querySelector("svg .band");
  if (seconds) setInterval(() => busy() || location.reload(), 1000 * seconds);
}
document.addEventListener("DOMContentLoaded", setUpPage);
