"""Corpora for the benchmarks of the data stages, made of what a machine with Python and its manuals has.

Passages are cut from sources, manuals and pages of text, each of mostly unseen runs of words; near-duplicates are planted among them by
editing, and their Jaccard index is computed, not assumed. Chapters of books, whose text is known, are set into real web pages.
"""

import gzip
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from real import minhash

ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".html", ".h", ".gz")
LEAST, TYPICAL, MOST = 300, 1300, 8000  # characters of a passage: lengths are lognormal, as those of web pages are
UNSEEN = 0.6  # least share of a passage's runs of words that no earlier passage has
MAIN = 200  # least characters of a page's main content
FURNITURE = 600  # words
BLOCK = 20_000  # passages whose words are in memory at once


class Planted(NamedTuple):
    """Texts, the family of each, and the pairs of parent and copy with their Jaccard index."""

    texts: list[str]
    family: np.ndarray
    pairs: list[tuple[int, int, float]]


def planted(count: int, roots: Sequence[Path], seed: int = 0) -> Planted:
    """`count` documents of which three in ten are edited copies of others, copies of copies among them."""
    dice = random.Random(seed)
    texts = passages(int(count * 0.7), roots, dice)
    family, edges = list(range(len(texts))), []
    while len(texts) < count:
        parent = dice.randrange(len(texts))
        edges.append((parent, len(texts)))
        texts.append(edited(texts[parent], dice))
        family.append(family[parent])
    order = np.random.default_rng(seed).permutation(count)
    place = np.argsort(order)
    pairs = [(int(place[a]), int(place[b]), jaccard(texts[a], texts[b])) for a, b in edges]
    return Planted([texts[i] for i in order], np.array(family)[order], pairs)


def edited(text: str, dice: random.Random) -> str:
    """The same in other clothes: respaced, with words replaced, with something before and behind, or cut."""
    words = re.split(r"(\s+)", text)
    how = dice.random()
    if how < 0.1:
        return text.replace(" ", "  ").upper()
    if how < 0.7:
        share = dice.uniform(0.001, 0.06)
        return "".join(f"{word[::-1]}x" if word.strip() and dice.random() < share else word for word in words)
    if how < 0.85:
        return f"Posted by user{dice.randrange(10**6)} on day {dice.randrange(3650)}\n{text}\nPage {dice.randrange(10**6)} of the archive"
    return "".join(words[: int(len(words) * dice.uniform(0.7, 0.99))])


def jaccard(left: str, right: str) -> float:
    """Of the sets of runs of five words."""
    a, b = minhash.shingles(left), minhash.shingles(right)
    return len(a & b) / len(a | b)


# -- passages


def passages(count: int, roots: Sequence[Path], dice: random.Random) -> list[str]:
    """Passages that have little in common, in a random order."""
    cut = [passage for text in _texts(roots) for passage in _pieces(text, dice)]
    dice.shuffle(cut)
    kept = [passage for passage, share in zip(cut, _seen(cut), strict=True) if share <= 1 - UNSEEN]
    if len(kept) < count:
        raise SystemExit(f"the texts of this machine make {len(kept):,} passages of unseen words, not {count:,}: ask for fewer")
    return kept[:count]


def _texts(roots: Sequence[Path]) -> Iterator[str]:
    for path in (path for root in roots for path in sorted(root.rglob("*")) if path.suffix in ENDINGS and path.is_file()):
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = content[:2_000_000].decode()
        except (OSError, EOFError, ValueError):
            continue  # other things than text also end so
        yield re.sub(r"<[^>]+>", " ", text) if path.suffix == ".html" else re.sub(r"^\.\w+ ?|\\f\w|\\", "", text, flags=re.M)


def _pieces(text: str, dice: random.Random) -> Iterator[str]:
    """Whole lines of about a drawn length."""
    piece, wanted = "", 0.0
    for line in text.splitlines(keepends=True):
        wanted = wanted or min(MOST, max(LEAST, dice.lognormvariate(np.log(TYPICAL), 0.7)))
        piece += line
        if len(piece) >= wanted:
            if len(piece) < 2 * MOST and len(minhash.words_of(piece)) >= 40:
                yield piece
            piece, wanted = "", 0.0


def _seen(texts: Sequence[str]) -> np.ndarray:
    """The share of each text's runs of five words that an earlier text has."""
    parts = [minhash._runs([minhash.words_of(text) for text in texts[at : at + BLOCK]]) for at in range(0, len(texts), BLOCK)]
    hashed = np.concatenate([hashes for hashes, _ in parts])
    counts = np.concatenate([np.diff(np.append(starts, len(hashes))) for hashes, starts in parts])
    again = pd.Series(hashed).duplicated().to_numpy()
    return np.add.reduceat(again.astype(np.int64), np.cumsum(counts) - counts) / counts


# -- books in web pages


def chapters(archive: Path) -> Iterator[tuple[str, str]]:
    """Each chapter of a book of Standard Ebooks: the markup of its body, and its text."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getnames()):
            if re.search(r"chapter.*\.xhtml$", member):
                markup = tar.extractfile(member).read().decode()
                body = re.search(r"<body[^>]*>(.*)</body>", markup, re.S).group(1)
                yield body, told(body)


def told(markup: str) -> str:
    """What a reader sees of simple markup."""
    import html

    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"</(p|h\d|li|blockquote|header|section)>", "\n", markup)))


def furnished(page: str, markup: str) -> str | None:
    """A real page with this markup in the place of its main content, the element whose own paragraphs are longest.

    None where it has no such element, or where much more text than menus, banners and footers have would stay.
    """
    from lxml import html

    tree = html.document_fromstring(re.sub(r"^\s*<\?xml[^>]*>", "", page))
    parents = {paragraph.getparent() for paragraph in tree.iter("p")} - {None}
    weights = {parent: sum(len(p.text_content()) for p in parent.findall("p")) for parent in parents}
    if max(weights.values(), default=0) < MAIN:
        return None
    place = max(weights, key=weights.get)
    paragraphs = place.findall("p")
    for part in html.fragments_fromstring(markup, no_leading_text=True):
        paragraphs[0].addprevious(part)
    for paragraph in paragraphs:
        place.remove(paragraph)
    return html.tostring(tree, encoding="unicode", doctype="<!DOCTYPE html>")


def furniture(pages: Sequence[str]) -> list[str]:
    """Those real pages of whose words but FURNITURE or fewer stay when their main content is taken out."""
    left = [(page, furnished(page, "<p></p>")) for page in pages]
    visible = [(page, re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", rest)) for page, rest in left if rest]
    return [page for page, rest in visible if len(told(rest).split()) <= FURNITURE]
