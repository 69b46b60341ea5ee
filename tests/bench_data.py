"""The data stages against datatrove: `DATATROVE=PYTHON python -m tests.bench_data [part …]`, PYTHON being one that has it.

Parts, all of them without one named: near (MinHash), memory, filters, pages (extraction), line (the whole), ahead (`sim` on four times the
corpus). Ratios are of processor seconds in one run on the same texts; datatrove gets as many of them as it does in minutes, and is left out
where DATATROVE is not set. It needs datatrove[processing] spacy warcio faust-cchardet python-magic orjson lxml_html_clean, and the same
trafilatura as here.
"""

import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from analysis.calibrate import _data
from conf.plan import Plan
from conf.program import load
from real import extract, minhash
from real.filters import judge
from real.life import Life
from real.maintext import main_text
from real.pages import read
from real.stage import Manifest
from sim.kernels import rates
from sim.life import live
from tests import corpora
from tests.bench import ROOT
from tests.test_world import SECOND

SHARED = ROOT.parent / "shared" / "data" / "text_and_web"
NEAR, THEIRS, PROSE, PAGES = 100_000, 6_000, 3_000, 240  # documents for us and for datatrove; texts to judge; pages to extract
SIZES = 50_000, 200_000  # documents for the peak of memory
LARGE = 120_000  # documents that are foretold from a quarter of them
FILE = 2_000  # documents of a file


def roots() -> list[Path]:
    """Where this machine's texts are."""
    return [Path(sysconfig.get_paths()["stdlib"]), Path("/usr/share"), Path(sysconfig.get_paths()["purelib"])]


def write_texts(folder: Path, texts: Sequence[str]) -> Path:
    folder.mkdir(parents=True)
    for at in range(0, len(texts), FILE):
        rows = (json.dumps({"id": str(at + i), "text": text}) for i, text in enumerate(texts[at : at + FILE]))
        (folder / f"{at:07}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return folder


def life(folder: Path, corpus: Path, *overrides: str) -> Life:
    plan = load([f"data.path={corpus}", "data.limit=1 TB", "cluster.cores_per_node=1", "cluster.gpus_per_node=1", *overrides])
    folder.mkdir(parents=True, exist_ok=True)
    return Life(plan, folder, lambda _: None)


def spent(folder: Path, work: Callable[[], Any]) -> float:
    """Processor seconds of the tasks that left receipts below a folder, and of this process meanwhile."""
    began = time.process_time()
    work()
    receipts = (json.loads(path.read_text()) for path in folder.rglob("receipts/*.json"))
    return time.process_time() - began + sum(receipt["cpu_seconds"] for receipt in receipts)


def datatrove(python: str, *words: str) -> dict[str, Any]:
    command = [python, str(ROOT / "tests" / "bench_datatrove.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"datatrove: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- near-duplicates


def near(python: str, folder: Path) -> None:
    """Recall by Jaccard index, precision, documents a second and core."""
    corpus = corpora.planted(NEAR, roots())
    texts = write_texts(folder / "near", corpus.texts)
    run = life(folder / "run", texts, "data.dedup=minhash")
    run.data(["extract"])
    seconds = spent(folder / "run" / "dedup", lambda: run.data(["dedup"]))
    numbers = _numbers(folder / "run" / "extract")
    joined = _joined(folder / "run" / "dedup" / "pairs", numbers, len(corpus.texts))
    print(f"\n{NEAR:,} documents, {sum(map(len, corpus.texts)) / 1e6:.0f} MB, {len(corpus.pairs):,} planted pairs")
    _recall(corpus.pairs, joined)
    _precision(corpus.family, joined)
    rate = NEAR / seconds
    print(f"all steps of dedup: {seconds:.1f} processor seconds, {rate:,.0f} documents a second and core")
    if python != "none":
        write_texts(folder / "theirs" / "text", corpus.texts[:THEIRS])
        told = datatrove(python, "minhash", str(folder / "theirs"))["seconds"]
        theirs = THEIRS / sum(told.values())
        steps = ", ".join(f"{name} {s:.1f} s" for name, s in told.items())
        print(f"datatrove, {THEIRS:,} of them: {theirs:,.0f} a second and core ({steps}): {rate / theirs:.0f} times (asked: 20)")


def _numbers(folder: Path) -> dict[str, int]:
    """Place in the corpus by document id."""
    rows = (row for path in sorted(folder.glob("*.parquet")) for row in extract.load(path))
    return {row.id: int(Path(row.source).name.partition(".")[0]) + row.number for row in rows}


def _joined(folder: Path, numbers: dict[str, int], count: int) -> np.ndarray:
    """For each document the one that stays of those that it hangs together with."""
    edges = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])
    first = np.arange(count)
    for one, other in minhash.components(edges):
        first[numbers[other]] = numbers[one]
    return first


def _recall(pairs: Sequence[tuple[int, int, float]], joined: np.ndarray) -> None:
    index = np.array([j for _, _, j in pairs])
    found = np.array([joined[a] == joined[b] for a, b, _ in pairs])
    for low, high in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        here = (index >= low) & (index < high)
        theory = np.mean(1 - (1 - index[here] ** minhash.ROWS) ** minhash.BANDS)
        told = f"{found[here].mean():.4f} found, of the pair alone {theory:.4f}"
        print(f"  Jaccard {low:.1f} to {min(1, high):.1f}: {here.sum():6,} pairs, {told}")
    for least, asked in ((0.8, 0.985), (0.9, 0.999)):
        print(f"  recall of Jaccard {least} and more: {found[index >= least].mean():.4f} (asked: {asked})")


def _precision(family: np.ndarray, joined: np.ndarray) -> None:
    """A document that goes is rightly gone where one of its family stays for it."""
    gone = np.flatnonzero(joined != np.arange(len(joined)))
    right = family[gone] == family[joined[gone]]
    print(f"  removed {len(gone):,}, for one of another family {len(gone) - right.sum():,}: precision {right.mean():.5f} (asked: 0.999)")


# -- memory


def memory(_: str, folder: Path) -> None:
    """The most memory that extract and dedup hold, all processes together, pages that they share counted once."""
    peaks = []
    bases = corpora.planted(SIZES[-1], roots(), seed=1).texts
    for count in SIZES:
        texts = write_texts(folder / f"memory{count}", bases[:count])
        words = [f"data.path={texts}", "data.limit=1 TB", "data.dedup=minhash", "cluster.gpus_per_node=2", "cluster.cores_per_node=2"]
        command = [sys.executable, "-c", "import sys; from conf.program import main; sys.exit(main(sys.argv[1:]))",
                   "real", "only=extract,dedup", *words]  # fmt: skip
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
        peaks.append(_watched(process))
        print(f"{count:,} documents, 2 workers: peak {peaks[-1] / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s", flush=True)
    print(f"four times the corpus: {peaks[-1] / peaks[0]:.2f} times the memory (asked: 1.2, and at most 1.5 GB)")


def _watched(process: subprocess.Popen[bytes]) -> float:
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(_share, _tree(process.pid))))
        time.sleep(0.1)
    if process.returncode:
        sys.exit("foretold real failed")
    return peak


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _tree(int(child))


def _share(pid: int) -> float:
    """Bytes of a process, of shared pages its share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0.0)


# -- filters


def filters(python: str, folder: Path) -> None:
    """The rules of FineWeb, text by text."""
    texts = prose()[:PROSE]
    began = time.process_time()
    ours = [judge(text, "fineweb")[1] for text in texts]
    seconds = time.process_time() - began
    print(f"\n{len(texts):,} texts, {sum(map(len, texts)) / 1e6:.1f} MB: {len(texts) / seconds:,.0f} a second and core, "
          f"{ours.count(None) / len(ours):.0%} stay")  # fmt: skip
    if python == "none":
        return
    (folder / "filters").mkdir()
    (folder / "filters" / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told = datatrove(python, "judge", str(folder / "filters"))
    same = [(mine is None) == (theirs is None) for mine, theirs in zip(ours, told["decisions"], strict=True)]
    rate = len(texts) / told["seconds"]
    print(f"datatrove: {rate:,.0f} a second and core: {told['seconds'] / seconds:.1f} times (asked: 6)")
    print(f"the same decision on {np.mean(same):.2%} (asked: 98)")
    apart = Counter((mine, theirs) for mine, theirs, alike in zip(ours, told["decisions"], same, strict=True) if not alike)
    for (mine, theirs), count in apart.most_common(8):
        print(f"  {count:4} texts: {mine or 'stays'} here, {theirs or 'stays'} there")


def prose() -> list[str]:
    """Texts of every sort, in a random order: pages, chapters, proposals, manuals."""
    dice = random.Random(5)
    texts = [main_text("trafilatura")(page) for page in web()]
    texts += [text for book in books() for _, text in corpora.chapters(book)]
    texts += (
        _members(SHARED / "text" / "eips.tar.gz")
        + _members(SHARED / "text" / "peps.tar.gz")
        + _members(SHARED / "text" / "rust-rfcs.tar.gz")
    )
    texts += corpora.passages(1000, roots()[1:2], dice)
    texts = [text[:20_000] for text in texts if text.strip()]
    dice.shuffle(texts)
    return texts


def _members(archive: Path) -> list[str]:
    import tarfile

    with tarfile.open(archive) as tar:
        return [tar.extractfile(member).read().decode(errors="replace") for member in tar if member.isfile()]


def books() -> list[Path]:
    return sorted((SHARED / "text").glob("se_*.tar.gz"))


def web() -> list[str]:
    """The real pages of the sample archives."""
    archives = [
        path for name in ("example.warc.gz", "warcfile.warc.gz", "whirlwind.warc.gz") for path in sorted((SHARED / "warc").rglob(name))
    ]
    return [page.text for path in archives for page in read(path, "text", 1e9, Counter()) if page.html]


# -- extraction


def pages(count: int) -> list[tuple[str, str]]:
    """Real pages with a chapter of a book for their main content, and the chapter's text."""
    frames = corpora.furniture(web())
    chapters = [chapter for book in books() for chapter in corpora.chapters(book)]
    dice = random.Random(3)
    dice.shuffle(chapters)
    return [(corpora.furnished(frames[i % len(frames)], markup), text) for i, (markup, text) in enumerate(chapters[:count])]


def extraction(_: str, __: Path) -> None:
    """F1 of words, page by page, and speed, of each extractor."""
    made = pages(PAGES)
    print(f"\n{len(made)} pages with known main text, of {len(corpora.furniture(web()))} frames")
    rates = {}
    for name in ("trafilatura", "trafilatura_fast", "resiliparse", "tags"):
        work = main_text(name)
        work(made[0][0])
        began = time.process_time()
        texts = [work(page) for page, _ in made]
        rates[name] = len(made) / (time.process_time() - began)
        scores = np.array([f1(text, gold) for text, (_, gold) in zip(texts, made, strict=True)])
        print(f"  {name:17} F1 {scores.mean():.3f} (least {scores.min():.3f}), {rates[name]:6.0f} pages a second and core, "
              f"{rates[name] / rates['trafilatura']:.1f} times the default's")  # fmt: skip


def f1(text: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, each as often as it stands."""
    mine, right = Counter(minhash.words_of(text)), Counter(minhash.words_of(gold))
    both = (mine & right).total()
    return 2 * both / max(1, mine.total() + right.total())


# -- the whole line


def line(python: str, folder: Path) -> None:
    """Web archives to packed shards, and texts to packed shards, with the same extractor and rules."""
    made = pages(10_000)
    archive = folder / "web" / "warc"
    archive.mkdir(parents=True)
    for part in range(4):
        _warc(archive / f"{part}.warc.gz", [page for page, _ in made[part::4]])
    rules = ["data.filter=fineweb", "data.dedup=minhash", "train.packing=best_fit"]
    _line("web archives", python, folder / "web", archive, ["data.extractor=trafilatura", *rules], 1.25)
    texts = write_texts(folder / "text" / "raw", prose())
    _line("texts", python, folder / "text", texts, rules, 5)


def _line(what: str, python: str, folder: Path, corpus: Path, overrides: Iterable[str], asked: float) -> None:
    run = life(folder / "run", corpus, *overrides)
    seconds = spent(folder / "run", lambda: run.data(["extract", "dedup", "tokens"]))
    size = sum(path.stat().st_size for path in corpus.iterdir())
    print(f"\n{what}, {size / 1e6:.1f} MB: {seconds:.1f} processor seconds, the training of the tokenizer included")
    if python == "none":
        return
    tokenizer = folder / "run" / "tokens" / "tokenizer.json"
    told = datatrove(python, "line", str(folder), json.dumps({"tokenizer": str(tokenizer), "end": _end(tokenizer)}))
    theirs = sum(told["seconds"].values())
    steps = ", ".join(f"{name} {s:.1f} s" for name, s in told["seconds"].items())
    mine = sum(path.stat().st_size for path in (folder / "run" / "tokens").glob("*.bin"))
    print(f"datatrove with that tokenizer: {theirs:.1f} ({steps}): {theirs / seconds:.2f} times (asked: {asked})")
    print(f"bytes of tokens: {mine:,} here, {told['bytes']:,} there")


def _end(tokenizer: Path) -> str:
    return str(json.loads(tokenizer.read_text())["added_tokens"][0]["content"])


def _warc(path: Path, made: Sequence[str]) -> None:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number, page in enumerate(made):
            head = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
            url = f"https://example.org/{path.stem}/{number}"
            writer.write_record(writer.create_warc_record(url, "response", BytesIO(page.encode()), http_headers=head))


# -- prediction of a larger corpus


def ahead(_: str, folder: Path) -> None:
    """Each stage's wall clock of four times the corpus, foretold from the rates and shares of once the corpus."""
    made = corpora.planted(LARGE, roots(), seed=2)
    texts = [made.texts[i] for i in np.argsort(made.family % 4, kind="stable")]  # a quarter has all of its families, and a quarter of them
    words = ["data.dedup=minhash", "cluster.gpus_per_node=2", "cluster.cores_per_node=2", "data.limit=1 TB",
             "train.steps=10", "train.warmup=1", "train.schedule=constant", "checkpoint.every=0"]  # fmt: skip
    first, plan = _executed(folder / "once", write_texts(folder / "texts1", texts[: LARGE // 4]), words)
    found, extracted = _data(plan, folder / "once"), Manifest.read(folder / "once" / "extract").counters
    left = first["extract.bytes"] / extracted["read"], extracted["documents"] / extracted["pages"]
    whole = write_texts(folder / "texts4", texts)
    expected = plan.but(**{
        "data.path": str(whole), "data.text_yield": left[0], "data.document_bytes": first["extract.bytes"] / extracted["pages"],
        "data.filtered": 1 - extracted["document bytes"] / first["extract.bytes"], "data.duplicates": first["dedup.removed_fraction"],
        "tokenizer.bytes_per_token": first["tokens.bytes"] / first["tokens.tokens"]})  # fmt: skip
    rated = replace(rates(expected), **{name: p.value for name, p in found.items() if name.endswith(("_rate", "_start"))})
    told = live(expected, 0, SECOND, rated).told
    measured, _ = _executed(folder / "four", whole, words)
    print(f"\n{LARGE:,} documents, foretold from {LARGE // 4:,}")
    asked = [
        ("dedup", "shuffle_bytes"),
        ("tokens", "tokens"),
        *((stage, "seconds") for stage in told),
        *((stage, "worker_memory") for stage in told),
    ]
    for stage, quantity in asked:
        mine, theirs = told[stage][quantity], measured[f"{stage}.{quantity}"]
        print(f"  {stage:8} {quantity:14} {mine:14,.2f} foretold {theirs:14,.2f} measured: {mine / theirs:.2f}")


def _executed(folder: Path, corpus: Path, words: Sequence[str]) -> tuple[dict[str, float], Plan]:
    plan = load([f"data.path={corpus}", *words])
    folder.mkdir()
    run = Life(plan, folder, lambda _: None)
    run.data(["extract", "dedup", "tokens"])
    return {name: row["value"] for name, row in run.close()["quantities"].items()}, plan


PARTS = {"near": near, "memory": memory, "filters": filters, "pages": extraction, "line": line, "ahead": ahead}


def data(asked: Sequence[str] = tuple(PARTS)) -> None:
    for name in asked:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](os.environ.get("DATATROVE", "none"), Path(folder))


if __name__ == "__main__":
    data(sys.argv[1:] or tuple(PARTS))
