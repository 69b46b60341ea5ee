"""From pages to tokens: what each stage of the data let through, what it refused and why, with samples to read.

Beside the rules that FineWeb has too stand the shares that it published, of its tokens on Common Crawl 2019-18 (Penedo et al. 2024,
sections 3.4 to 3.6): another corpus, so a difference is no error.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from analysis import plot
from analysis.page import Html, join, key, table, tag
from analysis.pair import Side
from conf.units import show

FINEWEB = {
    "braces": 0.028, "unfinished lines": 0.1014, "characters in repeated lines": 0.1247, "short lines": 0.0373, "lorem ipsum": 0.005,
    "near-duplicates": 16 / 36,
}  # fmt: skip
SAMPLES = 2  # shown of each reason
LANGUAGES = 12
Counters = Mapping[str, float]


def counters(side: Side) -> dict[str, Counters]:
    """What each data stage counted, by its name, the last time that it ran."""
    ends = (event for event in side.events if event["event"] == "end" and event["stage"] in ("extract", "dedup", "tokens"))
    return {str(event["stage"]): json.loads(event["detail"]) for event in ends}


def steps(found: Mapping[str, Counters]) -> list[tuple[str, float, float | None]]:
    """(What it is, documents, bytes of text where they were counted) from the files to the tokens; what goes is negative."""
    rows: list[tuple[str, float, float | None]] = []
    if told := found.get("extract"):
        rows += [(f"– {name.removeprefix('passed: ')}", -count, None) for name, count in _named(told, "passed: ")]
        rows = [("records of archives", told["records"], None), *rows] if "records" in told else []
        rows += [("pages", told.get("pages", 0), told["bytes"])]
        rows += [("– empty", -told["empty"], None)] if told["empty"] else []
        rows += [(f"– rule: {name}", -count, -told.get(f"refused bytes: {name}", 0)) for name, count in _named(told, "refused: ")]
        rows += [("– lines dropped", 0, -told["dropped bytes"])] if told.get("dropped bytes") else []
        rows += [("documents", told["documents"], told.get("document bytes"))]
    if told := found.get("dedup"):
        near = told["removed"] - told["removed_exact"] - told.get("emptied", 0)
        rows += [("– duplicates", -told["removed_exact"], None)]
        rows += [("– near-duplicates", -near, None)] if near else []
        rows += [("– passages that stand elsewhere", -told["emptied"], None)] if "emptied" in told else []
        rows += [("unique documents", told["documents"], told.get("bytes"))]
    return rows


def _named(told: Counters, prefix: str) -> list[tuple[str, float]]:
    """Counters of one kind without their prefix, the largest first."""
    named = ((name.removeprefix(prefix), count) for name, count in told.items() if name.startswith(prefix))
    return sorted(named, key=lambda item: (-item[1], item[0]))


def funnel(side: Side) -> Iterator[Html]:
    """The section of the report; nothing where no data stage ran."""
    found = counters(side)
    rows = steps(found)
    if not rows:
        return
    yield tag("h2", "From pages to tokens")
    yield tag("p", _sentence(found))
    first = next(count for name, count, _ in rows if name == "pages")
    yield table(("Step", "Documents", "Of pages", "Text", "FineWeb, of tokens"), [_line(*row, first) for row in rows])
    yield from _figures(found)
    yield from _languages(found.get("tokens", {}))
    yield from _samples(side)


def _sentence(found: Mapping[str, Counters]) -> str:
    told, made = found.get("extract", {}), found.get("tokens", {})
    parts = [f"{told.get('files', 0):,.0f} files of {show(told.get('read', 0.0), 'B')} gave {show(told.get('bytes', 0.0), 'B')} of text"]
    if made:
        tokens = made["train_tokens"] + made["held_out_tokens"]
        parts += [f"{tokens:,.0f} tokens came of it, {made['bytes'] / max(1, tokens):.2f} bytes each"]
    if masked := _named(told, "masked: "):
        parts += ["masked were " + ", ".join(f"{count:,.0f} {name}" for name, count in masked)]
    if "words_removed" in found.get("dedup", {}):
        cut = found["dedup"]
        parts += [f"{cut['words_removed'] / max(1, cut['words']):.1%} of the words stood elsewhere too and were cut out"]
    return "; ".join(parts) + "."


def _line(name: str, count: float, size: float | None, first: float) -> tuple[str, ...]:
    went = name.startswith("–")
    published = FINEWEB.get(name.removeprefix("– ").removeprefix("rule: "))
    share = f"{abs(count) / first:.1%}" if first and count else ""
    text = "" if not size else f"{'–' if went else ''}{show(abs(size), 'B')}"
    shown = f"{'–' if went else ''}{abs(count):,.0f}" if count else ""
    return (name if went else tag("b", name), shown, share, text, f"{published:.1%}" if published else "")


def _figures(found: Mapping[str, Counters]) -> Iterator[Html]:
    shown = []
    lengths = {int(name): count for name, count in _named(found.get("tokens", {}), "length: ")}
    if lengths:
        bars = {f"≤ {most:,}": (lengths[most], plot.MEASURED) for most in sorted(lengths)}
        shown.append(("How long documents are", "Documents by their tokens, in powers of two.", plot.bars(bars, "lengths", "1")))
    groups = {int(name): count for name, count in _named(found.get("dedup", {}), "groups of ")}
    if groups:
        bars = {name: (count, plot.OTHER) for name, count in _sized(groups).items()}
        shown.append(("How often the same is said", "Groups of near-duplicates by their documents; one of each stays.",
                      plot.bars(bars, "groups", "1")))  # fmt: skip
    if shown:
        figures = (tag("figure", tag("figcaption", tag("h3", title), tag("p", caption)), Html(svg)) for title, caption, svg in shown)
        yield tag("div", *figures, class_="figures")


def _sized(groups: Mapping[int, float]) -> dict[str, float]:
    """Counts by size in steps that double.

    >>> _sized({2: 5, 3: 1, 4: 1, 9: 2})
    {'2': 5, '3–4': 2, '9–16': 2}
    """
    found: dict[str, float] = {}
    for size in sorted(groups):
        most = 2 ** (size - 1).bit_length()
        name = str(size) if most == 2 else f"{most // 2 + 1:,}–{most:,}"
        found[name] = found.get(name, 0) + groups[size]
    return found


def _languages(told: Counters) -> Iterator[Html]:
    """How well the vocabulary serves each language."""
    sizes = _named(told, "bytes of language ")
    if not sizes:
        return
    rows = []
    for name, size in sizes[:LANGUAGES]:
        tokens, words = told[f"tokens of language {name}"], told[f"words of language {name}"]
        rows.append((key(name), show(size, "B"), f"{size / max(1, tokens):.2f}", f"{tokens / max(1, words):.2f}"))
    yield tag("h2", "Languages")
    more = f" The {len(sizes) - LANGUAGES} rarest are left out." if len(sizes) > LANGUAGES else ""
    yield tag("p", f"Compression in bytes a token, fertility in tokens a word (of those that spaces divide).{more}", class_="soft")
    yield table(("Language", "Text", "Bytes a token", "Tokens a word"), rows)


def _samples(side: Side) -> Iterator[Html]:
    """The first of what was refused for each reason."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((side.folder / "extract").glob("*.refused.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            shown.setdefault(sample["reason"], []).append(sample)
    rows = [
        (reason, join(tag("small", sample["url"] or sample["source"]), " ", sample["text"]))
        for reason in sorted(shown)
        for sample in islice(shown[reason], SAMPLES)
    ]
    if rows:
        yield tag("h2", "What was refused")
        yield tag("p", "The first of each reason, to read; more are in extract/*.refused.jsonl of the record.", class_="soft")
        yield table(("Reason", "Page"), rows, "text")
