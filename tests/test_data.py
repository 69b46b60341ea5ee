"""From files to batches: every document once, every sample in its place, every file what its receipt says."""

import gzip
import json
import shutil
import struct
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import Refused
from conf.plan import Plan
from conf.program import load
from conf.record import read
from real import bigram
from real.data import Batches, Blend, Order, Tokens, batch_of, token_bytes, training
from real.loss import IGNORED
from real.shards import MAGIC
from real.stage import Manifest, sha256
from tests.conftest import TINY
from tests.worlds import Stream, plan_of


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**31))
def test_an_epoch_holds_every_sample_once(windows, seed):
    order = Order(windows, seed)
    first = [order[i] for i in range(windows)]
    second = [order[windows + i] for i in range(windows)]
    assert sorted(first) == sorted(second) == list(range(windows))
    assert first == [Order(windows, seed)[i] for i in range(windows)]


def test_the_order_is_mixed_and_depends_on_seed_and_epoch():
    first, other = [[Order(1000, s)[i] for i in range(2000)] for s in (0, 1)]
    assert first[:1000] != other[:1000] and first[:1000] != first[1000:]
    assert abs(np.corrcoef(first[:1000], range(1000))[0, 1]) < 0.1


@pytest.fixture
def run_of(foretold, tmp_path):
    """Run the data stages over some files; returns the run's folder."""

    def run(*overrides: str):
        status, _, err = foretold("real", "only=extract,dedup,tokens", *TINY, *overrides)
        assert status == 0, err
        return next((tmp_path / "runs").glob("*/real"))

    return run


def test_every_kind_of_file_is_read(run_of, tmp_path):
    texts = {
        f"document number {i} about {word}" for i, word in enumerate(["cats", "dogs", "suns", "moons", "reds", "blues", "html & more"])
    }
    a, b, c, d, e, f, g = sorted(texts)
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(a)
    (folder / "deep" / "b.md").write_text(b)
    (folder / "c.rst").write_text(c)
    (folder / "d.jsonl").write_text(json.dumps({"text": d}) + "\n\n")
    with gzip.open(folder / "e.jsonl.gz", "wt") as out:
        out.write(json.dumps({"text": e, "x": 1}) + "\n")
    pq.write_table(pa.table({"text": [f, None]}), folder / "f.parquet")
    (folder / "g.html").write_text(f"<title>no</title><script>x</script><p>{g.replace('&', '&amp;')}</p>".replace("<title>no</title>", ""))
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "spoilt.parquet").write_bytes(b"not parquet")
    run = run_of(f"data.path={folder}")
    rows = [t for p in sorted((run / "extract").glob("*.parquet")) for t in pq.read_table(p).column("text").to_pylist()]
    assert set(rows) == texts
    counters = Manifest.read(run / "extract").counters
    assert counters["unreadable"] == 1 and counters["documents"] == 7 and counters["empty"] == 1
    assert "spoilt.parquet" in "".join(p.read_text() for p in (run / "extract").glob("*.unreadable.txt"))


def test_duplicates_go_and_the_smallest_id_stays(run_of, corpus):
    run = run_of(f"data.path={corpus}")
    before, after = ([r for p in (run / s).glob("*.parquet") for r in pq.read_table(p).to_pylist()] for s in ("extract", "dedup"))
    pair = [r for r in before if r["source"].endswith(("000.txt", "twin.txt"))]
    gone = {r["id"] for r in before} - {r["id"] for r in after}
    assert len(before) == 121 and len(after) == 120 and gone == {max(r["id"] for r in pair)}


def test_shards_are_megatrons_and_decode_to_the_text(run_of, corpus):
    from tokenizers import Tokenizer

    run = run_of(f"data.path={corpus}")
    tokenizer = Tokenizer.from_file(str(run / "tokens" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = {t for p in (run / "dedup").glob("*.parquet") for t in pq.read_table(p).column("text").to_pylist()}
    found = []
    for path in (run / "tokens").glob("*.idx"):
        data = path.read_bytes()
        assert data[:9] == MAGIC and struct.unpack_from("<QB", data, 9) == (1, 8)  # version 1, uint16
        count, documents = struct.unpack_from("<QQ", data, 18)
        lengths = np.frombuffer(data, np.int32, count, 34)
        pointers = np.frombuffer(data, np.int64, count, 34 + 4 * count)
        assert documents == count + 1 and len(data) == 34 + 12 * count + 8 * documents
        tokens = np.fromfile(path.with_suffix(".bin"), np.uint16)
        assert lengths.sum() == len(tokens)
        for start, length in zip(pointers // 2, lengths, strict=True):
            assert tokens[start + length - 1] == end
            found.append(tokenizer.decode(tokens[start : start + length - 1].tolist()))
    assert set(found) == texts and len(found) == len(texts)
    sizes = token_bytes(run / "tokens")
    all_tokens = np.concatenate([np.fromfile(p, np.uint16) for p in (run / "tokens").glob("*.bin")])
    assert sizes[all_tokens].sum() == sum(len(t.encode()) for t in texts)


def test_windows_join_shards_and_shift_by_one(run_of, corpus):
    run = run_of(f"data.path={corpus}")
    tokens = Tokens(run / "tokens", "train", 32)
    stream = np.concatenate(tokens.shards).astype(np.int64)
    for i in (0, 1, len(tokens) - 1):
        assert (tokens.window(i) == stream[i * 32 : i * 32 + 33]).all()
    assert len(tokens) == (len(stream) - 1) // 32


def test_the_same_digests_whatever_the_workers(run_of, corpus, tmp_path):
    digests = []
    for cores in (1, 2):
        run = run_of(f"data.path={corpus}", f"cluster.cores_per_node={cores}", f"seed={cores}")
        digests.append(Counter(o["sha256"] for s in ("extract", "dedup", "tokens") for o in Manifest.read(run / s).outputs))
        run.parent.rename(tmp_path / f"kept{cores}")
    assert digests[0] == digests[1]


def test_a_second_run_does_nothing_again(foretold, run_of, corpus):
    run = run_of(f"data.path={corpus}")
    before = {
        p: p.stat().st_mtime_ns
        for s in ("extract", "dedup", "tokens")
        for p in (run / s).iterdir()
        if p.suffix in (".parquet", ".bin", ".idx")
    }
    run_of(f"data.path={corpus}")
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize(("stage", "suffix"), [("extract", ".parquet"), ("dedup", ".parquet"), ("tokens", ".bin"), ("tokens", ".idx")])
def test_a_corrupt_shard_is_named(foretold, run_of, corpus, stage, suffix):
    run = run_of(f"data.path={corpus}")
    path = next(p for p in sorted((run / stage).glob(f"*{suffix}")) if "hashes" not in str(p))
    spoilt = bytearray(path.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    path.write_bytes(spoilt)
    following = {"extract": "dedup", "dedup": "tokens", "tokens": "pretrain"}[stage]
    if following != "pretrain":
        for receipt in (run / following / "receipts").iterdir():
            receipt.unlink()
        for receipt in (run / following).glob("hashes/receipts/*"):
            receipt.unlink()
        (run / "tokens" / "tokenizer.inputs.json").unlink()
    status, _, err = foretold("real", f"only={following}", *TINY, f"data.path={corpus}")
    assert status == 2 and f"{path} has another sha256 than its receipt: corrupt; delete" in err and "Traceback" not in err


def test_every_file_is_what_its_receipt_says_until_one_is_not(foretold, run_of, corpus):
    run = run_of(f"data.path={corpus}", "data.dedup=minhash")
    words = [*TINY, f"data.path={corpus}", "data.dedup=minhash"]
    status, out, _ = foretold("real", "verify=true", *words)
    assert status == 0 and all(stage in out for stage in ("extract", "dedup/bands", "dedup/hashes", "tokens"))
    path = next((run / "dedup" / "bands").glob("*.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    status, _, err = foretold("real", "verify=true", *words)
    assert status == 2 and f"{path} has another sha256" in err


def test_a_token_leads_back_to_its_page(foretold, run_of, corpus):
    from tokenizers import Tokenizer

    run = run_of(f"data.path={corpus}")
    stream, coder = Tokens(run / "tokens", "train", 32), Tokenizer.from_file(str(run / "tokens" / "tokenizer.json"))
    whole = np.concatenate([np.asarray(shard) for shard in stream.shards])
    for token in (0, 777, len(whole) // 2, len(whole) - 1):
        status, out, err = foretold("real", f"lineage={token}", "json=true", *TINY, f"data.path={corpus}")
        told = json.loads(out)
        assert status == 0, err
        text = Path(told["source"]).read_text()
        begin = token - told["token"]
        assert text.startswith(coder.decode(whole[begin : begin + 20].tolist())) and told["text"] == text[:200]
    status, _, err = foretold("real", f"lineage={len(whole)}", *TINY, f"data.path={corpus}")
    assert status == 2 and f"train has {len(whole):,} tokens, counted from 0" in err


def test_a_corrupt_manifest_is_named(foretold, run_of, corpus):
    run = run_of(f"data.path={corpus}")
    (run / "tokens" / "manifest.json").write_text('{"outputs": [')
    status, _, err = foretold("real", "only=pretrain", *TINY, f"data.path={corpus}")
    assert status == 2 and "manifest.json is corrupt" in err and len(err.strip().splitlines()) == 1


def test_data_stages_are_in_the_record(run_of, corpus):
    run = run_of(f"data.path={corpus}")
    told = {f"{r['stage']}.{r['quantity']}": r["value"] for r in read(run, "ledger")}
    assert told["extract.documents"] == 121 and told["dedup.documents"] == 120
    assert told["dedup.removed_fraction"] == pytest.approx(1 / 121)
    assert sha256(run / "tokens" / "tokenizer.json") == Manifest.read(run / "tokens").facts["sha256"]


def test_the_bigram_is_the_best_mixture():
    """On text drawn from a known bigram the baseline finds its entropy; on unseen pairs it falls back and stays finite."""
    dice = np.random.default_rng(0)
    matrix = dice.dirichlet(np.full(8, 0.3), size=8)
    walk = [0]
    for _ in range(60_000):
        walk.append(dice.choice(8, p=matrix[walk[-1]]))
    tokens = np.array(walk, np.int64)
    loss = bigram.held_out_loss([tokens[:50_000]], [tokens[50_000:]], 8)
    frequency = np.bincount(tokens, minlength=8) / len(tokens)
    entropy = -(frequency[:, None] * matrix * np.log(matrix + 1e-12)).sum()
    assert loss == pytest.approx(entropy, abs=0.02)
    assert np.isfinite(bigram.held_out_loss([np.zeros(100, np.int64)], [np.arange(100) % 7], 8))


def test_a_plan_without_a_corpus_cannot_be_executed(foretold):
    with pytest.raises(Refused):
        load(["data.path=null"])
    status, _, err = foretold("real", "data.path=null", "data.tokens=1000000")
    assert status == 2 and "real needs a corpus" in err


MESHES = [
    [], ["mesh.dp_shard=4"], ["mesh.dp_replicate=2", "mesh.dp_shard=2"], ["mesh.dp_shard=2", "mesh.tp=2"],
    ["mesh.dp_shard=2", "mesh.pp=2"], ["mesh.dp_shard=2", "mesh.cp=2"],
]  # fmt: skip


class Numbered:
    """Windows that hold their own number."""

    packed = False

    def __init__(self, windows: int) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return self.windows

    def window(self, index: int) -> np.ndarray:
        return np.full(33, index)


@cache
def dealt(*mesh: str) -> Plan:
    return plan_of("train.seq_len=32", "train.global_batch=8", "train.first_batch=4", "train.batch_warmup=4", "train.micro_batch=1", *mesh)


def seen(mesh: list[str], windows: int, steps: range) -> list[int]:
    """The samples of some steps, as the data-parallel ranks of a mesh read them."""
    plan = dealt(*mesh)
    ranks = [Batches(Numbered(windows), Order(windows, plan.seed), plan, rank) for rank in range(plan.dp)]  # type: ignore[arg-type]
    return [int(row[0]) for step in steps for rank in ranks for row in rank.step(step).inputs]


@settings(max_examples=10, deadline=None)
@given(st.integers(40, 400), st.integers(1, 12), st.sampled_from(MESHES), st.sampled_from(MESHES))
def test_an_epoch_is_the_same_on_every_mesh_and_across_a_resume(windows, cut, before, after):
    """The same samples in the same order; none twice in an epoch, none lost."""
    steps = windows // 8 + 4
    cut = min(cut, steps)
    alone = seen([], windows, range(steps))
    assert seen(before, windows, range(cut)) + seen(after, windows, range(cut, steps)) == alone
    assert sorted(alone[:windows]) == list(range(windows))


def test_the_batch_grows_and_the_cursor_follows():
    plan = plan_of("mesh.dp_shard=1", "train.global_batch=16", "train.first_batch=4", "train.batch_warmup=8", "train.micro_batch=1")
    sizes = [plan.batch(step) for step in range(12)]
    assert sizes == [4, 4, 8, 8, 12, 12, 16, 16, 16, 16, 16, 16]
    assert [plan.samples(step) for step in range(13)] == [sum(sizes[:step]) for step in range(13)]
    assert all(plan.step_of(plan.samples(step)) == step for step in range(13)) and plan.step_of(5) is None


def test_nothing_is_predicted_across_documents():
    plan = plan_of("mesh.dp_shard=1", "train.seq_len=32", "train.document_mask=true")
    stream = Stream(plan)
    batch = batch_of(stream, range(20), True)  # type: ignore[arg-type]
    assert batch.documents is not None
    ends = set(stream.ends.tolist())
    for window in range(20):
        for column in range(32):
            last = window * 32 + column + 1 in ends
            assert (int(batch.targets[window, column]) == IGNORED) == last
            assert (
                last == (column < 31 and int(batch.documents[window, column]) != int(batch.documents[window, column + 1])) or column == 31
            )


def test_a_mixture_gives_each_pattern_its_share(run_of, tmp_path):
    """Every block of samples holds each stream's share exactly; each stream is read in epochs of its own."""
    from tokenizers import Tokenizer

    for kind, word in (("py", "one"), ("md", "two"), ("txt", "three")):
        for i in range(4):
            (tmp_path / f"{kind}{i}.{kind}").write_text(" ".join(f"{word}{i}{n}" for n in range(900)))
    words = [f"data.path={tmp_path}/*.*", "data.mixture=['3 *.py','1 *.md']", "data.held_out=0.01", "train.evaluate_sequences=0"]
    run = run_of(*words)
    plan = load([*TINY, *words])
    streams, order = training(run / "tokens", plan)
    tokenizer = Tokenizer.from_file(str(run / "tokens" / "tokenizer.json"))
    picked = [order[i] for i in range(2 * Blend.BLOCK)]
    share = Counter("one" in tokenizer.decode(streams.window(w).tolist()) for w in picked)
    assert share == {True: 2 * Blend.BLOCK * 3 // 4, False: 2 * Blend.BLOCK // 4}
    visits = Counter(w for w in picked if w < streams.first[1])
    assert len(visits) == streams.first[1] and max(visits.values()) - min(visits.values()) <= 1  # epochs of its own
    assert not any("three" in tokenizer.decode(streams.window(w).tolist()) for w in set(picked))
    words[1] = "data.mixture=['3 *.py','1 *.rs']"
    shutil.rmtree(run.parent)
    with pytest.raises(Refused, match=r"no document of .* comes from a file like \*\.rs"):
        training(run_of(*words) / "tokens", load([*TINY, *words]))
