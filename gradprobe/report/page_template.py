"""The HTML page around a report: its CSS, and the script for tooltips, keys and the sorting of tables."""

from __future__ import annotations

from gradprobe.text.markup import escape

_CSS = """
:root { --paper: #ffffff; --ink: #1f2328; --faint: #656d76; --line: #dfe3e8; --wash: #f6f7f9;
  --healthy: #2e7d4f; --degraded: #8f6200; --broken: #c0362c; --focus: #1d5fae; color-scheme: light dark; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e6e8ea; --faint: #9aa3ad; --line: #30363d;
  --wash: #1b1f24; --healthy: #6fcf97; --degraded: #e5b34b; --broken: #ff7b72; --focus: #6cb0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 Inter, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.2rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 .35rem; }
h2 { font-size: 1.15rem; letter-spacing: -0.01em; margin: 2.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 42rem; }
.facts, figcaption, .note, .small { color: var(--faint); font-size: .9rem; }
.lead { font-size: 1.2rem; line-height: 1.45; margin: .9rem 0; max-width: 44rem; }
.notice { border-left: 3px solid var(--degraded); background: var(--wash); padding: .5rem .9rem; margin: 1.25rem 0; }
figure { margin: 1rem 0 0; }
figcaption { max-width: 42rem; margin-top: .6rem; }
svg .mark-rect path { shape-rendering: crispEdges; }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 3px; border-radius: 2px; }
svg [aria-label][aria-roledescription="point"] { cursor: default; }
.net { white-space: nowrap; }
.narrow { display: none; }
.narrow svg { width: 100%; max-width: 26rem; }
@media (max-width: 48rem) { .wide { display: none; } .narrow { display: block; } main { padding-top: 1.75rem; } }
.scroll { overflow-x: auto; margin: 1rem -1.25rem 0; padding: 0 1.25rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .4rem .45rem; text-align: right; white-space: nowrap; vertical-align: baseline; }
thead th { font-weight: 500; color: var(--faint); font-size: .82rem; line-height: 1.3; vertical-align: bottom; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--focus); }
th button::after { content: "↕"; opacity: .55; font-size: .8em; margin-left: .2em; }
th[aria-sort="ascending"] button::after { content: "↑"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "↓"; opacity: 1; }
thead tr:last-child th { border-bottom: 1px solid var(--line); }
thead .group { border-bottom: 1px solid var(--line); text-align: center; padding-bottom: .2rem; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th[scope="row"] { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--paper);
  max-width: 20rem; overflow: hidden; text-overflow: ellipsis; }
th.long { white-space: normal; overflow-wrap: break-word; }
@media (max-width: 48rem) { th.long { max-width: 9rem; } }
th:first-child, td:first-child { padding-left: 0; }
.text { text-align: left; }
td.text .small { display: block; font-size: .8rem; line-height: 1.3; }
.verdict { font-weight: 600; }
.verdict::before { content: ""; display: inline-block; width: .55em; height: .55em; border-radius: 50%;
  background: currentColor; margin-right: .45em; }
.healthy { color: var(--healthy); } .degraded { color: var(--degraded); } .broken { color: var(--broken); }
.unknown { color: var(--faint); }
dl { display: grid; grid-template-columns: fit-content(20rem) 1fr; gap: .45rem 1.25rem; margin: .75rem 0; }
dt { font-weight: 600; } dd { margin: 0; max-width: 40rem; overflow-wrap: anywhere; }
dl.run dt { font-weight: 400; color: var(--faint); }
ul { margin: .5rem 0; padding-left: 1.1rem; max-width: 42rem; } li { margin: .3rem 0; }
sup { font-size: .72em; line-height: 0; }
#tip { position: fixed; z-index: 1; pointer-events: none; max-width: 19rem; padding: .3rem .55rem; border-radius: 4px;
  background: var(--ink); color: var(--paper); font-size: .82rem; line-height: 1.35; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: .1rem; } dd { margin-bottom: .6rem; } }
ol.findings { list-style: none; margin: 1.25rem 0; padding: 0; max-width: none; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
ol.findings > li { margin: 0; padding: .8rem 1rem; background: var(--wash); border-top: 3px solid var(--broken); }
ol.findings h2 { font-size: 1rem; margin: 0 0 .35rem; } ol.findings p, ol.findings ul { font-size: .9rem; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; margin: 1rem 0 .5rem; font-weight: 600; }
#cursor { position: fixed; pointer-events: none; outline: 2px solid var(--ink); box-shadow: 0 0 0 3px var(--paper); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@page { margin: 14mm; }
@media print { .scroll { overflow: visible; margin: 1rem 0 0; padding: 0; } #tip, #cursor { display: none; }
  main { padding: 0; max-width: none; } body { font-size: 10pt; line-height: 1.4; } table, thead th { font-size: 7pt; }
  p, ul, figcaption, .lead { max-width: none; } .lead { font-size: 12pt; margin: .4rem 0; } li { margin: .1rem 0; }
  th, td { padding: .25rem; } h2 { break-after: avoid; margin: 1.2rem 0 .3rem; }
  .wide { display: block; } .narrow { display: none; } .wide svg { max-width: 146mm; max-height: 135mm; width: auto; }
  ol.findings { grid-template-columns: 1fr; gap: .4rem; margin: .6rem 0; } ol.findings > li { padding: .4rem .8rem; }
  ol.findings h2 { margin: 0 0 .1rem; } ol.findings p, ol.findings ul { margin: .15rem 0; }
  ol.findings ul { columns: 2; } h1 { font-size: 16pt; } td.text .small { font-size: 6.5pt; }
  figure { margin-top: .3rem; } figcaption { margin-top: .3rem; }
  figure, tr, li, thead { break-inside: avoid; } thead { display: table-header-group; }
  th[scope="row"] { position: static; max-width: 12rem; } th button { display: none; }
  thead th { white-space: normal; } th[data-title]::before { content: attr(data-title); }
  .verdict::before, ol.findings > li { print-color-adjust: exact; } }
"""

_SCRIPT = """
(function () {
  function add(id, name) {
    var part = document.createElement("div");
    part.id = id; part.className = name; part.hidden = !name; document.body.appendChild(part);
    return part;
  }
  var tip = add("tip", ""), cursor = add("cursor", ""), said = add("said", "unseen");
  said.setAttribute("aria-live", "polite");
  var POINT = '[aria-roledescription="point"][aria-label]';
  function show(text, x, y, aloud) {
    tip.hidden = !text;
    if (!text) { cursor.hidden = true; return; }
    tip.textContent = text;
    if (aloud) said.textContent = text;
    tip.style.left = Math.max(8, Math.min(x + 14, window.innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.max(8, y - tip.offsetHeight - 12) + "px";
  }
  function mark(box) {
    cursor.hidden = !box;
    if (!box) return;
    cursor.style.left = box.left + "px"; cursor.style.top = box.top + "px";
    cursor.style.width = box.width + "px"; cursor.style.height = box.height + "px";
  }
  // The cells of a heatmap have no elements with a text of their own: their texts are in a table beside the chart.
  function heat(svg) {
    var source = svg.closest("figure"); source = source && source.querySelector("script.cells");
    if (!source) return null;
    if (!source.cells) source.cells = JSON.parse(source.textContent);
    var plot = svg.querySelector(".plot_marks path, .plot_marks rect");
    return plot && { cells: source.cells, box: plot.getBoundingClientRect() };
  }
  function cell(map, row, column) {
    var box = map.box, cells = map.cells, edges = cells.edges, tall = box.height / cells.names.length;
    var left = box.left + edges[column][0] * box.width, wide = (edges[column][1] - edges[column][0]) * box.width;
    return { text: cells.names[row] + ", " + cells.steps[column] + ": " + cells.values[row][column],
      box: { left: left, top: box.top + row * tall, width: wide, height: tall } };
  }
  function under(map, x, y) {
    var at = (x - map.box.left) / map.box.width, deep = (y - map.box.top) / map.box.height;
    var row = Math.floor(deep * map.cells.names.length);
    if (row < 0 || row >= map.cells.names.length) return null;
    for (var column = 0; column < map.cells.edges.length; column++)
      if (at >= map.cells.edges[column][0] && at < map.cells.edges[column][1]) return cell(map, row, column);
    return null;
  }
  document.addEventListener("pointermove", function (event) {
    var svg = event.target.closest && event.target.closest("svg"), map = svg && heat(svg);
    var found = map && under(map, event.clientX, event.clientY);
    var point = !map && event.target.closest && event.target.closest("svg " + POINT);
    if (found) { show(found.text, event.clientX, event.clientY); mark(found.box); }
    else if (point) { show(point.getAttribute("aria-label"), event.clientX, event.clientY); mark(null); }
    else show("");
  });
  document.addEventListener("scroll", function () { show(""); }, { passive: true, capture: true });
  // Arrow keys walk over the points or cells of the chart that has the focus.
  document.querySelectorAll("figure svg").forEach(function (svg) {
    var points = svg.querySelectorAll(POINT), map = svg.querySelector(".plot_marks") && heat(svg);
    if (!points.length && !map) return;
    svg.setAttribute("tabindex", "0");
    var place = -1, row = 0, column = -1;
    svg.addEventListener("keydown", function (event) {
      var steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      if (event.key === "Escape") show("");
      if (!steps) return;
      event.preventDefault();
      var box, text;
      if (map) {
        map = heat(svg);
        column = Math.max(0, Math.min(map.cells.edges.length - 1, column + steps[0]));
        row = Math.max(0, Math.min(map.cells.names.length - 1, row + steps[1]));
        var now = cell(map, row, column);
        box = now.box; text = now.text;
      } else {
        place = Math.max(0, Math.min(points.length - 1, place + steps[0] + steps[1]));
        box = points[place].getBoundingClientRect(); text = points[place].getAttribute("aria-label");
      }
      mark(box); show(text, box.left + box.width, box.top, true);
    });
    svg.addEventListener("blur", function () { show(""); });
  });
  document.querySelectorAll("table.sortable th button").forEach(function (button) {
    button.addEventListener("click", function () {
      var head = button.parentNode, table = head.closest("table"), column = head.cellIndex;
      var down = head.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
      table.querySelectorAll("th[aria-sort]").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      function key(row) {
        var value = row.cells[column].getAttribute("data-value");
        if (value === null) return row.cells[column].textContent;
        value = value.replace(/inf$/, "Infinity");
        return value === "nan" ? NaN : Number(value);
      }
      Array.from(body.rows).map(function (row) { return [key(row), row]; }).sort(function (a, b) {
        a = a[0]; b = b[0];
        if (a !== a || b !== b) return (a !== a) - (b !== b);
        return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
      }).forEach(function (pair) { body.appendChild(pair[1]); });
    });
  });
})();
"""


def document(title: str, css: str, body: str) -> str:
    r"""Makes a self-contained page.

    Args:
        title: Title and headline, as plain text.
        css: CSS rules in addition to those of every page.
        body: HTML below the headline.

    Returns:
        A complete HTML document.

    Example:
        >>> "<h1>A &lt; B</h1>\n<p>text</p>" in document("A < B", "", "<p>text</p>")
        True
    """
    title = escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} – gradprobe</title>\n<style>{_CSS}{css}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{body}\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )
