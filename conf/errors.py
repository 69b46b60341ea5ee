"""What a user did wrong, said in one line: what, its value, the rule, the cure."""

from collections.abc import Iterable


class Refused(Exception):
    """The plan, the input or the machine does not allow what was asked; one line a problem, exit status 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type["Refused"], tuple[str, ...]]:
        return Refused, self.problems


def nearest(name: str, known: Iterable[str]) -> str:
    """The cure for a misspelt name: the nearest known one, or all of them when none is near.

    >>> nearest("nodse", ["nodes", "spares"])
    'did you mean nodes?'
    >>> nearest("x", ["nodes", "spares"])
    'it is one of nodes, spares'
    """
    import difflib

    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"it is one of {', '.join(sorted(names))}"
