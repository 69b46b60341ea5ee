"""In which language a text is, by py3langid's naive Bayes over byte n-grams (Lui & Baldwin 2012), which carries its model with it."""

from functools import cache
from typing import Any

LOOKED_AT = 5000  # characters; more of them change nothing


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(text: str) -> tuple[str, float]:
    """ISO 639-1 code and its probability among all that are known."""
    code, share = _identifier().classify(text[:LOOKED_AT])
    return str(code), float(share)


def known() -> list[str]:
    """The codes that there are."""
    return sorted(_identifier().labels)
