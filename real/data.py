"""Tokens for the trainer: which sequence comes when is a function of (seed, index) and of nothing else.

The order of an epoch is a permutation computed index by index (a Feistel network with cycle-walking), so there is no
shuffle table to store, and the data cursor of a checkpoint is one integer.
"""

import hashlib
import json
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from conf.errors import Refused
from conf.plan import Plan
from real.loss import IGNORED
from real.shards import read_index, trained
from real.stage import Manifest


class Tokens:
    """The token stream of one split, cut into windows of seq_len inputs and as many targets, shifted by one."""

    packed = masked = False

    def __init__(self, folder: Path, split: str, seq_len: int) -> None:
        manifest = Manifest.read(folder)
        self.seq_len = seq_len
        self.shards, lengths_of = [], []
        for output in manifest.outputs:
            if output["path"].startswith(f"{split}-") and output["path"].endswith(".bin"):
                path = manifest.verified(output)
                dtype, lengths = read_index(manifest.verified_twin(output, ".idx"))
                if int(lengths.sum()) * dtype.itemsize != path.stat().st_size:
                    raise Refused(
                        f"{path} holds {path.stat().st_size} bytes, its index says {int(lengths.sum()) * dtype.itemsize}; delete both"
                    )
                if len(lengths):
                    self.shards.append(np.memmap(path, dtype, mode="r"))
                    lengths_of.append(lengths)
        self.starts = np.concatenate(([0], np.cumsum([len(s) for s in self.shards]))).astype(np.int64)
        self.ends = np.cumsum(np.concatenate(lengths_of)) if lengths_of else np.zeros(0, np.int64)  # of the documents

    def __len__(self) -> int:
        """Windows in the stream."""
        return max(0, (int(self.starts[-1]) - 1) // self.seq_len)

    def window(self, index: int) -> np.ndarray:
        """Tokens of window `index`, one more than seq_len, int64."""
        return self._read(index * self.seq_len, self.seq_len + 1)

    def _read(self, start: int, left: int, shards: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """So many tokens of the stream, or of what lies beside it."""
        parts, shards = [], shards or self.shards
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while left:
            offset = start - self.starts[shard]
            part = shards[shard][offset : offset + left]
            parts.append(part)
            left, start, shard = left - len(part), start + len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)

    def learned(self, index: int) -> np.ndarray:
        """Which tokens of window `index` are to be predicted: all."""
        return np.ones(self.seq_len + 1, bool)

    def documents(self, index: int) -> np.ndarray:
        """The document of each token of window `index`, counted from the start of the stream."""
        start = index * self.seq_len
        return np.searchsorted(self.ends, np.arange(start, start + self.seq_len + 1), side="right")


class Packed(Tokens):
    """The same tokens in the sequences of a packing index: windows of whole documents, or of pieces of long ones.

    What is left of a window is filled with the first token; there, and across the end of a document, nothing is predicted.
    """

    packed = True

    def __init__(self, folder: Path, split: str, seq_len: int) -> None:
        super().__init__(folder, split, seq_len)
        manifest = Manifest.read(folder / "packs")
        held = next((output for output in manifest.outputs if output["path"] == f"{split}.npy"), None)
        if held is None:
            raise Refused(f"{folder / 'packs'} has no packs of {split}; run foretold real with only=tokens")
        self.pieces = np.load(manifest.verified(held), mmap_mode="r")
        self.first = np.searchsorted(self.pieces["pack"], np.arange(self.pieces["pack"].max(initial=-1) + 2))

    def __len__(self) -> int:
        return len(self.first) - 1

    def _pieces(self, index: int) -> list[tuple[int, int]]:
        """Where each piece starts in the stream, and its tokens; of a cut document also the one that its last token is to predict."""
        rows = self.pieces[self.first[index] : self.first[index + 1]]
        pieces = [(int(row["start"]), int(row["length"])) for row in rows]
        start, length = pieces[-1]
        goes_on = length == self.seq_len and self.ends[np.searchsorted(self.ends, start + length)] != start + length
        return [(start, length + 1)] if goes_on else pieces

    def window(self, index: int) -> np.ndarray:
        parts = [self._read(start, length) for start, length in self._pieces(index)]
        found = np.zeros(self.seq_len + 1, np.int64)
        found[: sum(map(len, parts))] = np.concatenate(parts)
        return found

    def documents(self, index: int) -> np.ndarray:
        """The piece of each token; what fills the rest is of no document, each a document by itself."""
        lengths = [length for _, length in self._pieces(index)]
        found = np.arange(len(lengths), len(lengths) + self.seq_len + 1)
        found[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
        return found


class Chats(Packed):
    """Packed conversations, with what is to be learned of them."""

    masked = True

    def __init__(self, folder: Path, split: str, seq_len: int) -> None:
        super().__init__(folder, split, seq_len)
        manifest = Manifest.read(folder)
        held = [o for o in manifest.paths(".learned") if o["path"].startswith(f"{split}-") and o["bytes"]]
        self.masks = [np.memmap(manifest.verified(output), np.uint8, mode="r") for output in held]

    def learned(self, index: int) -> np.ndarray:
        """Which tokens of window `index` are to be predicted, [seq_len + 1]."""
        found = np.zeros(self.seq_len + 1, bool)
        parts = [self._read(start, length, self.masks) for start, length in self._pieces(index)]
        found[: sum(map(len, parts))] = np.concatenate(parts) > 0
        return found


class Streams:
    """Several streams as one: windows of the first, then of the second, and so on."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts = list(parts)
        self.packed, self.masked = any(part.packed for part in parts), any(part.masked for part in parts)
        self.first = [0, *accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self.first[-1]

    def _find(self, index: int) -> tuple[Tokens, int]:
        part = bisect_right(self.first, index) - 1
        return self.parts[part], index - self.first[part]

    def window(self, index: int) -> np.ndarray:
        tokens, index = self._find(index)
        return tokens.window(index)

    def documents(self, index: int) -> np.ndarray:
        tokens, index = self._find(index)
        return tokens.documents(index)

    def learned(self, index: int) -> np.ndarray:
        tokens, index = self._find(index)
        return tokens.learned(index)


class Blend:
    """Window of sample 0, 1, 2, … where each stream has its share of the samples, in an order of its own.

    Every block of samples holds each stream's share exactly, so the window is a function of (seed, sample) alone.
    """

    BLOCK = 1024

    def __init__(self, streams: Streams, weights: Sequence[float], seed: int) -> None:
        self.first, self.seed = streams.first, seed
        edges = [round(self.BLOCK * share / sum(weights)) for share in accumulate(weights)]
        self.edges = [0, *edges]  # of the streams' slots in a block
        self.orders = [Order(len(part), seed) for part in streams.parts]
        self.mixed = Order(self.BLOCK, seed)

    def __getitem__(self, sample: int) -> int:
        block, slot = sample // self.BLOCK, self.mixed[sample]
        part = bisect_right(self.edges, slot) - 1
        count = self.edges[part + 1] - self.edges[part]
        return self.first[part] + self.orders[part][block * count + slot - self.edges[part]]


class Order:
    """Position of sample 0, 1, 2, … in the corpus: epoch after epoch, each in its own order."""

    def __init__(self, windows: int, seed: int) -> None:
        self.windows, self.seed = windows, seed

    @cached_property
    def half(self) -> int:
        return max(1, ((self.windows - 1).bit_length() + 1) // 2)

    def __getitem__(self, sample: int) -> int:
        epoch, position = divmod(sample, self.windows)
        while True:  # walk the cycle until it lands inside
            position = self._feistel(position, epoch)
            if position < self.windows:
                return position

    def _feistel(self, value: int, epoch: int) -> int:
        mask = (1 << self.half) - 1
        left, right = value >> self.half, value & mask
        for round_ in range(4):
            key = struct.pack("<qqqq", self.seed, epoch, round_, right)
            mixed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") & mask
            left, right = right, left ^ mixed
        return left << self.half | right


def training(folder: Path, plan: Plan) -> tuple[Streams, Order | Blend]:
    """What a plan trains on, and the window of each of its samples.

    Raises Refused when it is less than a batch, or a pattern of the mixture fits nothing.
    """
    mixture = plan.data.weights
    kind = Packed if plan.train.packing == "best_fit" else Tokens
    streams = Streams([kind(folder, split, plan.train.seq_len) for split in trained(mixture)])
    for pattern, part in zip(mixture, streams.parts, strict=False):
        if not len(part):
            raise Refused(
                f"data.mixture: no document of {plan.data.path} comes from a file like {pattern}, or too little text; leave it out"
            )
    refuse_small(streams, plan, "train")
    return streams, Blend(streams, list(mixture.values()), plan.seed) if mixture else Order(len(streams), plan.seed)


def tuning(folder: Path, plan: Plan) -> tuple[Streams, Order]:
    """What a fine-tuning trains on.

    Raises Refused when it is less than a batch.
    """
    streams = Streams([Chats(folder, "train", plan.train.seq_len)])
    if len(streams) < plan.train.global_batch:
        raise Refused(f"finetune.data={plan.finetune.data} makes {len(streams)} sequences of {plan.train.seq_len} tokens, a step takes "
                      f"finetune.global_batch={plan.train.global_batch}; give more conversations, or lower finetune.seq_len")  # fmt: skip
    return streams, Order(len(streams), plan.seed)


def refuse_small(tokens: Streams | Tokens, plan: Plan, split: str) -> None:
    need = plan.train.global_batch if split == "train" else 1
    if len(tokens) < need:
        have = f"less than {(len(tokens) + 1) * plan.train.seq_len + 1} tokens = {len(tokens)} sequences of {plan.train.seq_len}"
        wanted = f"one batch needs {need}" if split == "train" else "evaluation needs at least one"
        raise Refused(f"the {split} split of data.path={plan.data.path} has {have}; {wanted}; give more text, or lower train.seq_len")


@dataclass(frozen=True)
class Batch:
    """Sequences of a rank: inputs and targets [B, T], int64, and the document of each input token when they matter."""

    inputs: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None

    def take(self, positions: torch.Tensor) -> "Batch":
        """The columns that a context-parallel rank holds."""
        return Batch(*(None if x is None else x[:, positions] for x in (self.inputs, self.targets, self.documents)))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in (self.inputs, self.targets, self.documents)))  # type: ignore[arg-type]

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of so many sequences."""
        for start in range(0, len(self.inputs), size):
            part = slice(start, start + size)
            yield Batch(self.inputs[part], self.targets[part], None if self.documents is None else self.documents[part])


def batch_of(tokens: Streams | Tokens, windows: Sequence[int], document_mask: bool) -> Batch:
    """The sequences of these windows; across a document's end nothing is predicted when documents are kept apart."""
    both = torch.from_numpy(np.stack([tokens.window(i) for i in windows]))
    inputs, targets = both[:, :-1].contiguous(), both[:, 1:].contiguous()
    if not document_mask and not tokens.packed:
        return Batch(inputs, targets, None)
    documents = torch.from_numpy(np.stack([tokens.documents(i) for i in windows]))
    targets = targets.where(documents[:, :-1] == documents[:, 1:], IGNORED)
    if tokens.masked:
        targets = targets.where(torch.from_numpy(np.stack([tokens.learned(i) for i in windows]))[:, 1:], IGNORED)
    return Batch(inputs, targets, documents[:, :-1] if document_mask else None)


class Batches:
    """The sequences of one data-parallel rank, step by step."""

    def __init__(self, tokens: Streams | Tokens, order: Order | Blend, plan: Plan, dp_rank: int) -> None:
        self.tokens, self.order, self.plan, self.dp_rank = tokens, order, plan, dp_rank
        self.reader = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future[Batch]] | None = None
        self.passed_over: Callable[[int], int] = lambda _: 0  # samples left out before a step, after rollbacks
        self.dealt: Callable[[int], range] = range  # which of a step's samples these data-parallel ranks share

    def samples(self, step: int) -> range:
        """Global indices of this rank's samples in a step: contiguous, so that every mesh sees the same step."""
        dealt = self.dealt(self.plan.batch(step))
        share = len(dealt) // self.plan.dp
        first = self.plan.samples(step) + self.passed_over(step) + dealt.start + self.dp_rank * share
        return range(first, first + share)

    def step(self, step: int) -> Batch:
        """All that this rank works on in a step; the next step's is read meanwhile."""
        ahead, self.ahead = self.ahead, (step + 1, self.reader.submit(self._read, step + 1))
        return ahead[1].result() if ahead and ahead[0] == step else self._read(step)

    def rewind(self) -> None:
        """What was read ahead is not what comes next."""
        self.ahead = None

    def _read(self, step: int) -> Batch:
        return batch_of(self.tokens, [self.order[i] for i in self.samples(step)], self.plan.train.document_mask)


def token_bytes(folder: Path) -> np.ndarray:
    """Bytes of text that each token stands for (0 for special ones), from the tokenizer's vocabulary."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {t["id"] for t in tokenizer["added_tokens"]}
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for text, index in vocabulary.items():
        sizes[index] = 0 if index in special else len(text)  # byte-level BPE writes one character a byte
    return sizes
