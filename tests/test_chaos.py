"""A slice of `make chaos`: twenty faults over four runs, one a mesh."""

import pytest

from tests.chaos import campaign


@pytest.mark.slow
def test_twenty_random_faults(tmp_path, capsys):
    bad = campaign(100, 4, tmp_path)
    out = capsys.readouterr().out
    assert bad == 0 and "4 runs, 20 of 20 faults fired" in out, out
