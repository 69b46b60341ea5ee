"""Byte-level BPE: the canonical tokenizer is Hugging Face's tokenizer.json; faster libraries do the work where they agree with it.

gigatoken trains and encodes, tiktoken encodes. Before either is used it does a sample beside Hugging Face's tokenizers, and whatever
differs in one token or one merge is not used: no result depends on what is installed.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

END = "<|endoftext|>"
SAMPLE = 200_000  # bytes of the texts on which a faster library must agree
SMALL = 2_000_000  # characters that tokenizers is through with before a faster library is even imported
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # how a text is split before merges (GPT-2)
HARD = "naïve 東京 🎉\u200d👩 \x00\r\n\t  we'll  12345 ﬁ e\u0301 \u00a0x ١٢ don't\n\n\n  end "
Encode = Callable[[Sequence[str]], list[NDArray[np.int64]]]


def train(texts: Iterable[str], vocab: int) -> tuple[str, str]:
    """The JSON of a tokenizer trained on texts, and the library that did it."""
    read = iter(texts)
    head = list(_until(read, SMALL))
    if (more := next(read, None)) is not None:
        read, sample = chain([more], read), list(_until(iter(head), SAMPLE))
        with contextlib.suppress(ImportError):
            if _gigatoken_trained(sample, 1000) == _trained(sample, 1000):
                return _gigatoken_trained([*head, *read], vocab), "gigatoken"
    return _trained(chain(head, read), vocab), "tokenizers"


def _until(texts: Iterator[str], most: int) -> Iterator[str]:
    while most > 0 and (text := next(texts, None)) is not None:
        most -= len(text.encode())
        yield text


def _trained(texts: Iterable[str], vocab: int) -> str:
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gigatoken_trained(texts: list[str], vocab: int) -> str:
    import gigatoken
    from tokenizers import AddedToken, models

    mark = b"\xff\xfe\xff"  # between texts: never in UTF-8
    with _silent():
        _, merges = gigatoken.train_bpe(mark.join(text.encode() for text in texts), vocab, [END], separator=mark)
    letters = _letters()
    pairs = [("".join(letters[b] for b in left), "".join(letters[b] for b in right)) for left, right in merges]
    names = [END, *sorted(letters.values()), *(left + right for left, right in pairs)]
    tokenizer = _byte_level(models.BPE({name: number for number, name in enumerate(names)}, pairs))
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return str(tokenizer.to_str())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What a library prints past Python is not for the user's screen."""
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for number, old in enumerate(kept, 1):
            os.dup2(old, number)
            os.close(old)
        os.close(nowhere)


def _letters() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte: itself where it can be seen (Radford et al. 2019, GPT-2's encoder)."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + number) for number, byte in enumerate(unseen)}


class Coder:
    """Texts → ids by the fastest library that agrees with tokenizers; END inside a text is ordinary text."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        self.path = path
        self.slow = Tokenizer.from_file(path)
        self.slow.encode_special_tokens = True
        self.end, self.vocab = self.slow.token_to_id(END), self.slow.get_vocab_size()
        self.library, self.fast = "tokenizers", self._slowly

    def check(self, texts: Sequence[str]) -> None:
        """Choose the library: the first that gives the same ids for these texts."""
        if sum(map(len, texts)) <= SMALL:
            return
        sample = [HARD, *_until(iter(texts), SAMPLE)]
        wanted = self._slowly(sample)
        for library, make in (("gigatoken", self._gigatoken), ("tiktoken", self._tiktoken)):
            with contextlib.suppress(ImportError, ValueError):
                found = make()
                if all(map(np.array_equal, found(sample), wanted)):
                    self.library, self.fast = library, found
                    return

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """The ids of each text."""
        odd = {number for number, text in enumerate(texts) if END in text}
        fast = iter(self.fast([text for number, text in enumerate(texts) if number not in odd]))
        slow = iter(self._slowly([texts[number] for number in sorted(odd)]))
        return [next(slow if number in odd else fast) for number in range(len(texts))]

    def _slowly(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [np.array(found.ids, np.int64) for found in self.slow.encode_batch_fast(list(texts))]

    def _gigatoken(self) -> Encode:
        import awkward
        import gigatoken

        coder = gigatoken.Tokenizer(self.path)

        def encode(texts: Sequence[str]) -> list[NDArray[np.int64]]:
            if not texts:
                return []
            found = coder.encode_batch(list(texts), parallel=False)
            flat, ends = np.asarray(awkward.flatten(found)), np.cumsum(np.asarray(awkward.num(found)))
            return np.split(flat.astype(np.int64), ends[:-1])

        return encode

    def _tiktoken(self) -> Encode:
        import tiktoken

        coder = tiktoken.Encoding(Path(self.path).name, pat_str=GPT2, mergeable_ranks=self._ranks, special_tokens={})
        return lambda texts: [np.array(coder.encode_ordinary(text), np.int64) for text in texts]

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        """The bytes of each token."""
        of = {letter: byte for byte, letter in _letters().items()}
        return {bytes(of[letter] for letter in name): number for name, number in self.slow.get_vocab().items() if name != END}
