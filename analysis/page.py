"""A page: HTML whose text is always escaped, in one calm style, with nothing to load from anywhere.

Whatever is a plain string is text and is escaped; only `Html` is markup, and only this file and the figures make it.
"""

import re
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5f6875; --line: #dfe3e8; --paper: #ffffff; --ground: #f6f7f9; --mark: #1f6ab8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4b1; --line: #2f353d; --paper: #1a1e24; --ground: #121519; --mark: #7ab8f5; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 0.3rem; }
h2 { font-size: 1.25rem; font-weight: 650; margin: 2.6rem 0 0.9rem; }
h3 { font-size: 1rem; font-weight: 650; margin: 0 0 0.15rem; }
p { margin: 0 0 0.6rem; max-width: 72ch; }
.lead { font-size: 1.1rem; }
.soft, small, figcaption p { color: var(--soft); }
.note { border-left: 3px solid var(--mark); padding-left: 0.9rem; }
small { display: block; font-size: 0.8rem; line-height: 1.35; }
code { font: 0.88em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 12px; margin: 1.6rem 0 0; }
.card, figure, .box { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 1.45rem; line-height: 1.3; font-weight: 620; font-variant-numeric: tabular-nums; }
.card i { font-style: normal; font-size: 0.85rem; font-weight: 500; }
.card span { display: block; font-size: 0.85rem; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
figcaption p { font-size: 0.85rem; margin: 0 0 0.7rem; }
.box { overflow-x: auto; padding: 4px 16px; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; vertical-align: top; padding: 7px 0 7px 18px; border-top: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: 0.82rem; border-top: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 130px; }
.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.text th { text-align: left; }
tr.sum td { font-weight: 600; }
.groups { columns: 2 400px; column-gap: 16px; }
.groups section { break-inside: avoid; margin-bottom: 16px; }
.groups td { white-space: normal; overflow-wrap: break-word; }
.short { white-space: nowrap; }
.figures + .box { margin-top: 16px; }
.box + p { margin-top: 0.7rem; }
.groups tr:first-child td { border-top: 0; }
.groups h3 { padding-top: 8px; }
footer { margin-top: 3rem; font-size: 0.85rem; color: var(--soft); }
@media (max-width: 560px) {
  main { padding: 24px 12px 40px; }
  h1 { font-size: 1.5rem; }
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; }
  .card { padding: 10px 12px; }
  .card b { font-size: 1.15rem; }
  figure { padding: 12px 10px; }
  .box { padding: 2px 10px; }
  .numbers thead { display: none; }
  .numbers tr { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 2px 12px; padding: 9px 0; border-top: 1px solid var(--line); }
  .numbers tr:first-child { border-top: 0; }
  .numbers td { border: 0; padding: 0; text-align: left; white-space: normal; }
  .numbers td:first-child { grid-column: 1 / -1; }
  .numbers td.none { display: none; }
  .numbers td[data-label="10–90%"] { order: 1; grid-column: 1 / -1; }
  .numbers td:not([data-label=""])::before { content: attr(data-label); display: block; font-size: 0.75rem; color: var(--soft); }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #ccc; --paper: #fff; --ground: #fff; font-size: 11px; }
  main { max-width: none; padding: 0; }
  .card, figure, tr, h2 { break-inside: avoid; }
  h2 { break-after: avoid; }
  .cards { grid-template-columns: repeat(4, 1fr); }
  .figures { grid-template-columns: 1fr 1fr; }
}
"""
_NOTHING = ("", "–")
_VOID = ("meta", "wbr")


class Html(str):
    """Markup, as opposed to text."""


def tag(name: str, /, *content: str, **attributes: str) -> Html:
    """An element; its text is escaped. underscores in the names of attributes become dashes, one at the end falls off.

    >>> tag("p", "a < b ", tag("b", "c"), class_="soft")
    '<p class="soft">a &lt; b <b>c</b></p>'
    """
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{told}>" if name in _VOID else f"<{name}{told}>{join(*content)}</{name}>")


def join(*content: str) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in content))


def key(name: str) -> Html:
    """A name of the program, which may break after its dots and underscores."""
    return tag("code", *(part if part.isalnum() else join(part, tag("wbr")) for part in re.split(r"(?<=[._])", name)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers", sums: int = 0) -> Html:
    """A table without its empty columns; the last `sums` rows are totals. On a phone, each cell carries its column's name."""
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] not in _NOTHING for row in rows)]
    lines = []
    for number, row in enumerate(rows):
        cells = [tag("td", row[i], data_label=head[i] if head and i else "", class_="none" if row[i] in _NOTHING else "some") for i in kept]
        lines.append(tag("tr", *cells, class_="sum" if number >= len(rows) - sums else "row"))
    top = tag("thead", tag("tr", *(tag("th", head[i], scope="col") for i in kept))) if head else Html()
    return tag("div", tag("table", top, tag("tbody", *lines), class_=kind), class_="box")


def document(title: str, *body: str) -> str:
    """A whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return f'<!DOCTYPE html>\n<html lang="en">{head}{tag("body", tag("main", *body))}</html>\n'
