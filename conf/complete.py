"""Completion: what the TAB key offers, read from the tables that the program itself obeys.

`eval "$(foretold completion)"` in ~/.bashrc teaches bash to ask `foretold complete WORDS` at every TAB. Keys open like drawers:
`clu` offers `cluster=` and `cluster.`, and only `cluster.` shows what lies inside.
"""

import importlib
from collections.abc import Iterable, Sequence
from typing import get_origin

from conf.program import VERBS, Options
from conf.schema import choices, groups, keys

HELP = ("-h", "--help")
SCRIPT = r"""
_foretold() {
    local IFS=$'\n' i word line=${COMP_LINE:0:COMP_POINT} words=()
    for ((i = 0; i < COMP_CWORD; i++)); do  # bash parts words at = and :, blanks alone part ours
        [[ $i == 0 || $line == [[:space:]]* ]] && words+=("")
        line=${line#"${line%%[![:space:]]*}"}
        words[-1]+=${COMP_WORDS[i]} line=${line#"${COMP_WORDS[i]}"}
    done
    [[ $line == [[:space:]]* ]] && words+=("")
    words[-1]+=${line#"${line%%[![:space:]]*}"}
    words=("${words[@]//[\'\"\\]/}") word=${words[-1]} COMPREPLY=()
    case $word in plan=* | profile=* | data.path=* | runs=* | out=*) compopt -o default; return ;; esac
    COMPREPLY=($("$1" complete "${words[@]:1}" 2>/dev/null))
    [[ ${COMPREPLY-} == *[=.] ]] && compopt -o nospace
    COMPREPLY=("${COMPREPLY[@]#"${word%"$2"}"}")  # $2 is what bash replaces
}
complete -F _foretold foretold
""".strip()


def complete(words: Sequence[str]) -> list[str]:
    """Whole candidates for the last word, which may be empty; a name that goes on ends in = or a dot.

    >>> complete(["sim", "cluster.no"]), complete(["sim", "gpu.kind="])
    (['cluster.nodes='], ['gpu.kind=cpu', 'gpu.kind=cuda', 'gpu.kind=tpu'])
    """
    *before, word = words or [""]
    return [candidate for candidate in _candidates(before, word) if candidate.startswith(word)]


def _candidates(before: Sequence[str], word: str) -> Iterable[str]:
    if not before:
        return VERBS
    verb, *given = before
    if verb not in VERBS:
        return ()
    if word.startswith("-"):
        return ("--help",)
    return _of_analysis(given, word) if verb == "analysis" else _of_plan(verb, given, word)


def _of_analysis(given: Sequence[str], word: str) -> Iterable[str]:
    """An action, then its options."""
    actions = importlib.import_module("analysis.__main__").ACTIONS  # by name: conf imports nobody
    action = next((arg for arg in given if arg in actions), "")
    return _of_options(f"analysis.{action}", word) if action else actions


def _of_plan(verb: str, given: Sequence[str], word: str) -> Iterable[str]:
    """What the plan knows is answered from its tables alone: a verb takes its time to load."""
    name, equals, _ = word.partition("=")
    if given and given[-1] in HELP and not equals:
        return groups()
    offered = [f"{name}={value}" for value in _values_of(name)] if equals else _names(word)
    if "." in name or (equals and offered):
        return offered
    return [*_of_options(f"{verb}.__main__", word), *offered]


def _of_options(module: str, word: str) -> list[str]:
    """A verb's or an action's own options: their names, or the values of the one that is a flag."""
    options: Options = importlib.import_module(module).OPTIONS
    name, equals, _ = word.partition("=")
    if not equals:
        return [f"{option}=" for option in options]
    is_flag = name in options and options[name][0] in ("true", "false")
    return [f"{name}=true", f"{name}=false"] if is_flag else []


def _names(word: str) -> list[str]:
    """Groups and keys that share the word's dots, those deeper as `group.`; tables, which no single word fills, are left out."""
    drawer = word[: word.rfind(".") + 1]
    found = [] if drawer else [f"{group}=" for group in ("experiment", *groups()) if choices(group)]
    for key, (kind, *_) in keys().items():
        if key.startswith(drawer) and get_origin(kind) is not dict:
            first, dot, _ = key.removeprefix(drawer).partition(".")
            found.append(drawer + first + (dot or "="))
    return list(dict.fromkeys(found))


def _values_of(name: str) -> Sequence[str]:
    """The options of a group, or the values of a key that has only a few."""
    if name in ("experiment", *groups()):
        return choices(name)
    kind, _, must = keys().get(name, (None, "", None))
    if kind is bool:
        return ("true", "false")
    return must if isinstance(must, tuple) else ()
