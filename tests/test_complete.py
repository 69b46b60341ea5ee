"""TAB: what is offered for a word, and what a real bash makes of it."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.complete import SCRIPT, complete

ROOT = Path(__file__).parents[1]
PROGRAM = "from conf.program import main; raise SystemExit(main())"
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("", "sim real analysis"),
        ("an", "analysis"),
        ("simm exp", ""),
        ("sim exp", "experiment="),
        ("sim experiment=llama3_4", "experiment=llama3_405b experiment=llama3_405b_full"),
        ("sim clu", "cluster= cluster."),
        ("sim cluster.no", "cluster.nodes="),
        ("sim cluster.no ", None),
        ("sim model.mo", "model.moe."),
        ("sim model.moe.t", "model.moe.top_k="),
        ("sim gpu.kind=", "gpu.kind=cpu gpu.kind=cuda gpu.kind=tpu"),
        ("sim model.tied=t", "model.tied=true"),
        ("sim json=", "json=true json=false"),
        ("sim replicas=", ""),
        ("sim modle=", ""),
        ("sim see", "seed="),
        ("sim data=python rep", "replicas="),
        ("sim publ", ""),
        ("sim --", "--help"),
        ("sim --help clu", "cluster"),
        ("real fre", "fresh="),
        ("real fresh=", "fresh=true fresh=false"),
        ("analysis comp", "compare"),
        ("analysis compare ", "runs= plan= json="),
        ("analysis compare json=f", "json=false"),
        ("analysis --help cal", "calibrate"),
    ],
)  # fmt: skip
def test_candidates(line, offered):
    found = complete(line.split(" "))
    assert found == offered.split() if offered is not None else len(found) > 20


def test_no_word_at_all():
    assert complete([]) == ["sim", "real", "analysis"]


def test_nothing_heavy_is_loaded():
    heavy = "import sys; from conf.complete import complete; complete(['sim', 'gpu.kind=']); "
    loaded = subprocess.run(
        [sys.executable, "-c", heavy + "print({'torch', 'hydra', 'pandas', 'simpy'} & {*sys.modules})"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded.stdout == "set()\n"


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """The environment of a bash that finds a `foretold`, in a folder with two files."""
    program = tmp_path / "bin" / "foretold"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{PROGRAM}" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "completion.bash").write_text(SCRIPT)
    (tmp_path / "corpus one.txt").touch()
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "PS1": "> ", "TERM": "dumb"}


@needs_bash
@pytest.mark.parametrize(
    ("words", "text", "offered"),
    [
        ("foretold sim clu", "clu", "compopt -o nospace\ncluster=\ncluster.\n"),
        ("foretold sim experiment = ll", "ll", "llama2_70b\nllama3_405b\nllama3_405b_full\nllama3_8b\nllama3_8b_grpo\nllama_65b\n"),
        ("foretold sim experiment =", "", None),
        ("foretold sim data.path = x", "x", "compopt -o default\n\n"),
    ],
)
def test_the_function(shell, tmp_path, words, text, offered):
    script = """. ./completion.bash; compopt() { echo compopt "$@"; }
    COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=${1// = /=} COMP_LINE=${COMP_LINE/% =/=} COMP_POINT=${#COMP_LINE}
    _foretold foretold "$2"; printf '%s\\n' "${COMPREPLY[@]}" """
    command = ["bash", "--norc", "-c", script, "bash", words, text]
    told = subprocess.run(command, env=shell, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stderr == ""
    assert told.stdout == offered if offered is not None else "h200\nlaptop\n" in told.stdout


@needs_bash
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("foretold re\t", "foretold real "),
        ("foretold sim exp\t", "foretold sim experiment="),
        ("foretold sim exp\th2\t", "foretold sim experiment=h200 "),
        ("foretold sim 'experiment=h2\t", "foretold sim 'experiment=h200' "),
        ('foretold sim experiment="h2\t', 'foretold sim experiment="h200" '),
        ("A=1 foretold  sim  seed=3 cluster.no\t4", "A=1 foretold  sim  seed=3 cluster.nodes=4"),
        ("true && foretold sim gpu.kind=t\t", "true && foretold sim gpu.kind=tpu "),
        ("foretold sim data.path=cor\t", r"foretold sim data.path=corpus\ one.txt "),
        ("foretold sim data.path='corpus o\t", "foretold sim data.path='corpus one.txt' "),
        ("foretold sim train.steps=c\t", "foretold sim train.steps=c"),
    ],
)
def test_the_tab_key(shell, tmp_path, typed, line):
    """Ctrl-G prints the line as readline then holds it."""
    with Keyboard(shell, tmp_path) as keyboard:
        keyboard.type(r"""bind -x '"\C-g": printf "<%s>\n" "$READLINE_LINE"'; . ./completion.bash; echo rea''dy""" + "\n", "ready")
        told = keyboard.type(typed + "\a", ">\r\n")
    assert re.findall("<(.*)>\r\n", told) == [line]


class Keyboard:
    """A bash at a terminal of its own."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**env, "INPUTRC": "/dev/null"})

    def __enter__(self) -> "Keyboard":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.terminal)
        os.waitpid(self.child, 0)

    def type(self, text: str, awaited: str) -> str:
        """Type, and read until the awaited answer; bash works its keys off one after the other, a TAB like any."""
        os.write(self.terminal, text.encode())
        seen, end = "", time.monotonic() + 20
        while awaited not in seen and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.1)[0]:
                seen += os.read(self.terminal, 4096).decode(errors="replace")
        return seen
