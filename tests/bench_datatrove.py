"""datatrove's side of `tests.bench_data`, run by a Python that has it: `python bench_datatrove.py ACTION FOLDER [extras as JSON]`.

Each action prints one JSON object with the processor seconds of its steps, children included; nothing of foretold is imported.
"""

import json
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader, WarcReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter

MINHASH = MinhashConfig(num_buckets=14, hashes_per_bucket=8, n_grams=5)


def spent(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the processor seconds of this process and its finished children."""
    before = _seconds()
    return work(), _seconds() - before


def _seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def run(*steps: PipelineStep, tasks: int = 1) -> None:
    with tempfile.TemporaryDirectory() as logs:
        LocalPipelineExecutor(pipeline=list(steps), tasks=tasks, workers=1, logging_dir=logs).run()


def filters() -> list[Any]:
    """FineWeb's rules in its order, at the values that its paper names (section 3.6, which has none on the number of lines)."""
    own = C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter(char_duplicates_ratio=0.1, new_line_ratio=float("inf"))
    return [GopherRepetitionFilter(), GopherQualityFilter(), *own]


def judge(folder: Path) -> dict[str, Any]:
    """The rule that refuses each text of texts.jsonl, or null."""
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    rules = filters()
    for rule in rules:
        rule.filter(Document(text=texts[0], id="0"))  # what is loaded once is loaded here
    decisions, seconds = spent(lambda: [_decision(rules, text) for text in texts])
    return {"decisions": decisions, "seconds": seconds}


def _decision(rules: Iterable[Any], text: str) -> str | None:
    document = Document(text=text, id="0")
    for rule in rules:
        said = rule.filter(document)
        if said is not True:
            return str(said[1]) if isinstance(said, tuple) else type(rule).__name__
    return None


def minhash(folder: Path) -> dict[str, Any]:
    """Near-duplicates of the texts, by its four steps; the ids that stay."""
    source = JsonlReader(str(folder / "text"))
    signatures, buckets, clusters, kept = (str(folder / name) for name in ("signatures", "buckets", "clusters", "kept"))
    steps = {
        "signatures": lambda: run(source, MinhashDedupSignature(signatures, MINHASH)),
        "buckets": lambda: run(MinhashDedupBuckets(signatures, buckets, config=MINHASH), tasks=14),
        "clusters": lambda: run(MinhashDedupCluster(buckets, clusters, config=MINHASH)),
        "filter": lambda: run(source, MinhashDedupFilter(clusters), JsonlWriter(kept, compression=None)),
    }
    seconds = {name: spent(step)[1] for name, step in steps.items()}
    ids = [json.loads(line)["id"] for path in Path(kept).glob("*.jsonl") for line in path.read_text().splitlines()]
    return {"seconds": seconds, "kept": ids}


def line(folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    """Web archives, or texts, to tokens: extraction, filters, near-duplicates, tokens."""
    web = (folder / "warc").is_dir()
    pages = [WarcReader(str(folder / "warc")), Trafilatura(favour_precision=False, timeout=60, deduplicate=False)]
    reader = pages if web else [JsonlReader(str(folder / "raw"))]
    seconds = {"extract": spent(lambda: run(*reader, *filters(), JsonlWriter(str(folder / "text"), compression=None)))[1]}
    seconds |= minhash(folder)["seconds"]
    tokens = DocumentTokenizer(str(folder / "tokens"), more["tokenizer"], shuffle_documents=False, eos_token=more["end"])
    seconds["tokens"] = spent(lambda: run(JsonlReader(str(folder / "kept")), tokens))[1]
    return {"seconds": seconds, "bytes": sum(path.stat().st_size for path in (folder / "tokens").glob("*.ds"))}


def main() -> None:
    action, folder = sys.argv[1], Path(sys.argv[2])
    told = line(folder, json.loads(sys.argv[3])) if action == "line" else {"judge": judge, "minhash": minhash}[action](folder)
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
