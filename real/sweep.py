"""Several plans, one after the other: each in a process of its own, so that one that ends badly costs the others nothing."""

import subprocess
import sys
from collections.abc import Sequence

from conf.sweep import expand, varied


def sweep(words: Sequence[str], options: Sequence[str]) -> int:
    """Execute every point; returns 0 when all are done, 1 when some ended badly."""
    points = expand(words)
    names, failed = varied(points), 0
    for number, point in enumerate(points, 1):
        said = " ".join(word for word in point if word.partition("=")[0] in names)
        print(f"\npoint {number} of {len(points)}: {said}", flush=True)
        done = subprocess.run([sys.executable, "-m", "real", *options, *point], check=False)
        if done.returncode == 130:  # Ctrl-C is for all of them
            return done.returncode
        failed += done.returncode != 0
    print(f"\n{len(points) - failed} of {len(points)} points are done; next: foretold analysis scaling data=runs")
    return int(failed > 0)
