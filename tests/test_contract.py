"""The picture of the code: sim → conf ← real, analysis on top; stages and mechanisms come in twins."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("conf", "sim", "real", "analysis")
ARROWS = {"conf": set(), "sim": {"conf"}, "real": {"conf"}, "analysis": {"conf", "sim"}}
HOMES = {"simpy": {"sim"}, "torch": {"real"}, "matplotlib": {"analysis"}, "hydra": {"conf"}, "omegaconf": {"conf"}}
# Modules without a twin; ARCHITECTURE.md says why for each.
ALONE = {
    "sim": {"story", "whatif", "expect", "sweep", "search", "traffic", "advice", "step", "schedule", "flows", "activations",
            "room", "storm", "elastic", "pace", "lives", "sensitivity", "feed", "clocks", "grid", "load", "money"},
    "real": {
        "adapters", "archive", "attention", "bigram", "bpe", "buddy", "chats", "contamination", "data", "dry", "engine", "filters", "fp8",
        "frontier", "jsonl", "nf4", "objectives", "digits", "generator", "learner", "pairs", "policy", "preferences", "samples",
        "scoring", "guard", "heartbeat", "huggingface", "initial", "integrity", "language", "layers", "lineage", "loss", "maintext",
        "measure", "minhash", "model", "moe", "muon", "nvml", "optim", "packing", "pages", "pipeline", "place", "private", "profile",
        "progress", "prompts", "remote", "resume", "rewards", "server", "shards", "slurm", "stability", "stage", "storage",
        "straggler", "substring", "tiers", "trainer", "urls", "winnow",
        "gpu", "passes", "products", "stopwatch", "watts",
    },
}  # fmt: skip


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows(package):
    for path in modules(package):
        others = imports(path) & set(PACKAGES) - {package}
        assert others <= ARROWS[package], f"{path.relative_to(ROOT)} imports {others - ARROWS[package]}"


@pytest.mark.parametrize("library", HOMES)
def test_libraries_have_one_home(library):
    for package in PACKAGES:
        users = [str(p.relative_to(ROOT)) for p in modules(package) if library in imports(p)]
        assert not users or package in HOMES[library], f"{users} import {library}"


def test_twins():
    names = {package: {p.stem for p in modules(package)} - {"__init__", "__main__"} for package in ("sim", "real")}
    assert names["sim"] - names["real"] <= ALONE["sim"]
    assert names["real"] - names["sim"] <= ALONE["real"]
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for package, alone in ALONE.items():
        for name in alone:
            assert f"{package}/{name}.py" in text, f"ARCHITECTURE.md does not say why {package}/{name}.py has no twin"


def test_a_prediction_loads_no_trainer_and_no_plots(tmp_path):
    code = (
        "import sys; from conf.program import main; main(['sim', 'json=true', sys.argv[1]]); "
        "print([m for m in ('torch', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, f"runs={tmp_path}"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.strip().endswith("[]")
