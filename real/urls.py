"""Pages that their address alone keeps out: a list of domains and of words, one a line."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from conf.errors import Refused


class Blocklist:
    """Lines with a dot are domains, which include what lies below them; others are words of an address; # begins a remark."""

    def __init__(self, path: Path) -> None:
        """Raises Refused for a line that is neither."""
        self.domains: set[str] = set()
        self.words: set[str] = set()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            entry = line.partition("#")[0].strip().lower()
            if entry and not re.fullmatch(r"[\w\-.]+", entry):
                raise Refused(f"{path}, line {number}: {entry!r} is neither a domain (bad.example) nor a word")
            if entry:
                (self.domains if "." in entry else self.words).add(entry)

    def hit(self, url: str) -> str | None:
        """The entry that keeps an address out."""
        low = url.lower()
        try:
            host = urlsplit(low).hostname or ""
        except ValueError:
            return None  # an address that is none names no domain
        parts = host.split(".")
        for start in range(len(parts) - 1):
            if (domain := ".".join(parts[start:])) in self.domains:
                return domain
        return next((word for word in re.findall(r"[^\W_]+", low) if word in self.words), None)
