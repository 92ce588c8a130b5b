"""The HTML page around a report: its CSS, and the script that shows a tooltip for a mark of a chart."""

from __future__ import annotations

import html

from gradprobe.errors import printable

_CSS = """
:root { --paper: #ffffff; --ink: #1f2328; --faint: #656d76; --line: #dfe3e8; --wash: #f6f7f9;
  --healthy: #2e7d4f; --degraded: #b07800; --broken: #c0362c; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e8ea; --faint: #9aa3ad; --line: #30363d;
  --wash: #1b1f24; --healthy: #6fcf97; --degraded: #e5b34b; --broken: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 Inter, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 63rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.2rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 .35rem; }
h2 { font-size: 1.15rem; letter-spacing: -0.01em; margin: 2.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 42rem; }
.facts, figcaption, .note, .small { color: var(--faint); font-size: .9rem; }
.lead { font-size: 1.2rem; line-height: 1.45; margin: .9rem 0; max-width: 44rem; }
.notice { border-left: 3px solid var(--degraded); background: var(--wash); padding: .5rem .9rem; margin: 1.25rem 0; }
figure { margin: 1rem 0 0; }
figcaption { max-width: 42rem; margin-top: .6rem; }
svg { display: block; max-width: 100%; height: auto; }
svg [aria-label][aria-roledescription="point"] { cursor: default; }
.net { white-space: nowrap; }
.narrow { display: none; }
.narrow svg { width: 100%; max-width: 26rem; }
@media (max-width: 48rem) { .wide { display: none; } .narrow { display: block; } main { padding-top: 1.75rem; } }
.scroll { overflow-x: auto; margin: 1rem -1.25rem 0; padding: 0 1.25rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .4rem .5rem; text-align: right; white-space: nowrap; vertical-align: baseline; }
thead th { font-weight: 500; color: var(--faint); font-size: .82rem; line-height: 1.3; vertical-align: bottom; }
thead tr:last-child th { border-bottom: 1px solid var(--line); }
thead .group { border-bottom: 1px solid var(--line); text-align: center; padding-bottom: .2rem; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th[scope="row"] { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--paper);
  max-width: 20rem; overflow: hidden; text-overflow: ellipsis; }
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
@media print { .scroll { overflow: visible; } #tip { display: none; } }
"""

_SCRIPT = """
(function () {
  var tip = document.createElement("div");
  tip.id = "tip"; tip.hidden = true; document.body.appendChild(tip);
  document.addEventListener("pointerover", function (event) {
    var mark = event.target.closest && event.target.closest('svg [aria-roledescription="point"][aria-label]');
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.getAttribute("aria-label");
    var x = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    tip.style.left = Math.max(8, x) + "px";
    tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
  });
})();
"""


def escape(text: str) -> str:
    r"""Makes a text inert in a page: neither markup nor control characters and direction marks act in it.

    Example:
        >>> print(escape("<b>\u202e"))
        &lt;b&gt;\u202e
    """
    return html.escape(printable(text))


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
