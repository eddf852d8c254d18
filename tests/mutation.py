"""Mutation testing: change the code in small ways, and see whether a unit test notices.

    python -m tests.mutation
    python -m tests.mutation packing --verbose

Each mutant runs in a forked process, in which the changed module stands in for the real one; no
file is touched. Prints the survivors and the score of each module, and returns 1 if one is below
90 %. Left alone are what no test of behaviour can see: docstrings, annotations, decorators, log
messages and the words of errors.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.metadata
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
PACKAGE = "qwen3_reranker"
MODULES = {"prompt": "text/prompt", "tokenization": "text/tokenizer", "packing": "engine/packing"}
"""File of each, by the name of its unit tests."""
GOAL = 0.9
TIMEOUT_S = 300
_PATIENCE = 2
"""A mutant that takes this many times as long as the code itself never ends; it is noticed."""

_SEED = 0
_MOST = 500

# (module, changed line, mutation) -> why no test can tell it from the original.
_SPEED = "decides how long it takes, not what comes out"
_NONE_TO_ADD = "the tokenizer without added tokens has no post-processor that would add any"
_ONE_LENGTH = "both sides have one length whatever is given"
_OVERWRITTEN = "is set again before it is read"
EQUIVALENT = {
    **{
        ("tokenization", f"{name} = {value}", f"{value} -> {value + step}"): _SPEED
        for name, value in (
            ("_CHARS_PER_TOKEN", 6), ("_GROWTH", 4), ("_MARGIN", 64), ("_CHUNK", 256),
        )
        for step in (1, -1)
    },
    **{
        ("tokenization", line, "False -> True"): _NONE_TO_ADD
        for line in (
            "(encoding,) = self._plain.encode_batch([text], add_special_tokens=False)",
            "(encoding,) = self._plain.encode_batch_fast([text], add_special_tokens=False)",
            "encodings = self._plain.encode_batch_fast(parts, add_special_tokens=False)",
        )
    },
    **{
        ("tokenization", line, "True -> False"): _ONE_LENGTH
        for line in (
            "for query, document in zip(_PROBES, reversed(_PROBES), strict=True):",
            "for i, part, encoding in zip(chunk, parts, encodings, strict=True):",
        )
    },
    **{
        ("packing", "self._cached = 0", change): _OVERWRITTEN
        for change in ("statement removed", "0 -> 1", "0 -> -1")
    },
    (
        "tokenization", "if not is_whole and len(encoding) < limit + _MARGIN:", "Lt -> LtE"
    ): _SPEED,
    ("packing", "max_cached_tokens: int = 0", "0 -> -1"): "no beginning is that short either way",
}  # fmt: skip

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


class Mutant(NamedTuple):
    """A module with one change."""

    module: str
    line: int
    text: str
    change: str
    tree: ast.Module

    @property
    def key(self) -> tuple[str, str, str]:
        """How `EQUIVALENT` names it."""
        return self.module, self.text, self.change


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Yield what may stand in a node's place, None for nothing."""
    new: Any = copy.deepcopy(node)
    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                new = copy.deepcopy(node)
                new.ops[i] = _COMPARISONS[type(operator)]()
                yield f"{type(operator).__name__} -> {type(new.ops[i]).__name__}", new
        case ast.BinOp() | ast.AugAssign() if type(node.op) in _ARITHMETIC:
            new.op = _ARITHMETIC[type(node.op)]()
            yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
        case ast.BoolOp():
            new.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
            yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
        case ast.UnaryOp(op=ast.Not()):
            yield "not removed", new.operand
        case ast.UnaryOp(op=ast.USub()):
            yield "minus removed", new.operand
        case ast.If() | ast.While() | ast.IfExp():
            new.test = ast.UnaryOp(ast.Not(), new.test)
            yield "condition negated", new
        case ast.comprehension(ifs=[_, *_]):
            new.ifs[0] = ast.UnaryOp(ast.Not(), new.ifs[0])
            yield "condition negated", new
        case ast.Constant(value=bool()):
            yield f"{node.value} -> {not node.value}", ast.Constant(not node.value)
        case ast.Constant(value=int()):
            for step in (1, -1):
                yield f"{node.value} -> {node.value + step}", ast.Constant(node.value + step)
        case ast.Constant(value=str()):
            yield "string changed", ast.Constant(node.value + "X")
    match node:
        case ast.Expr() | ast.Assign() | ast.AugAssign() | ast.Raise() | ast.Break():
            yield "statement removed", None
        case ast.Continue():
            yield "continue -> break", ast.Break()
        case ast.Return(value=ast.expr()):
            yield "return None", ast.Return(ast.Constant(None))


def is_left_alone(node: ast.AST) -> bool:
    """Say whether nothing below a node is changed: docstrings, messages, logging."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="logger")))):
            return True
        case ast.Import() | ast.ImportFrom() | ast.JoinedStr():
            return True
        case ast.Assign(targets=[ast.Name(id="_PROBES")]):  # samples of a check, one like another
            return True
    return False


def mutants(module: str) -> list[Mutant]:
    """Return every mutant of a module."""
    source = (ROOT / PACKAGE / f"{MODULES[module]}.py").read_text(encoding="utf-8")
    tree, lines, found = ast.parse(source), source.splitlines(), []

    def visit(node: ast.AST, path: list[tuple[str, int | None]]) -> None:
        if is_left_alone(node):
            return
        line = getattr(node, "lineno", 0)
        if line:
            for change, replacement in changes(node):
                mutated = _replaced(tree, path, replacement)
                found.append(Mutant(module, line, lines[line - 1].strip(), change, mutated))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list") or (
                isinstance(node, ast.Raise) and name == "exc"
            ):
                continue
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST):
                    visit(child, [*path, (name, i if isinstance(value, list) else None)])

    visit(tree, [])
    return found


def _replaced(
    tree: ast.Module, path: Sequence[tuple[str, int | None]], new: ast.AST | None
) -> ast.Module:
    """Return a copy of a tree in which another node stands at a place."""
    root = copy.deepcopy(tree)
    parent: Any = root
    for name, i in path[:-1]:
        parent = getattr(parent, name) if i is None else getattr(parent, name)[i]
    name, i = path[-1]
    new = ast.Pass() if new is None else new
    if i is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[i] = new
    return ast.fix_missing_locations(root)


class _Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a mutant in the place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = f"{PACKAGE}.{MODULES[mutant.module].replace('/', '.')}"
        self.file = str(ROOT / PACKAGE / f"{MODULES[mutant.module]}.py")
        self.tree = mutant.tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_loader(name, self, origin=self.file)

    def exec_module(self, module: Any) -> None:
        exec(compile(self.tree, self.file, "exec"), module.__dict__)  # noqa: S102


class _Tokenizers:
    """Stands for `tokenizers.Tokenizer`: what is built from a file is built once for all forks."""

    from_str = staticmethod(cache(Tokenizer.from_str))


def is_noticed(mutant: Mutant | None, module: str, timeout_s: float) -> bool:
    """Run a module's unit tests on a mutant, or on the code as it is."""
    child = os.fork()
    if child == 0:
        _run_tests(mutant, module)
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _run_tests(mutant: Mutant | None, module: str) -> None:
    import pytest

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    code = 1
    try:
        if mutant is not None:
            sys.meta_path.insert(0, _Stand(mutant))
        file = str(ROOT / "tests" / "unit" / f"test_{module}.py")
        early = "ignore::pytest.PytestAssertRewriteWarning"  # plugins are imported already
        code = int(pytest.main([file, "-x", "-q", "-p", "no:cacheprovider", "-W", early]))
    finally:
        os._exit(code)


def _build_tokenizers() -> None:
    from tests.small_tokenizer import small_tokenizer_json

    content = small_tokenizer_json()
    plain = {**json.loads(content), "added_tokens": [], "post_processor": None}
    for state in (content, json.dumps(plain)):
        _Tokenizers.from_str(state)


def main(argv: list[str] | None = None) -> int:
    """Run, print, and say whether every module is good enough."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--most", type=int, default=_MOST, help="mutants drawn if there are more")
    parser.add_argument("--verbose", action="store_true", help="print each mutant as it ends")
    args = parser.parse_args(argv)

    # What the tests need and no mutant changes is imported once, before the forks.
    import hypothesis
    import tokenizers

    importlib.import_module("tests.official")
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    tokenizers.Tokenizer = _Tokenizers  # type: ignore[misc]
    hypothesis.settings.register_profile(
        "mutation", database=None, derandomize=True, max_examples=40
    )
    hypothesis.settings.load_profile("mutation")
    os.chdir(ROOT)
    if "tokenization" in args.modules:
        _build_tokenizers()
    everything = [mutant for module in args.modules for mutant in mutants(module)]
    drawn = everything
    if len(everything) > args.most:
        drawn = random.Random(_SEED).sample(everything, args.most)
    print(f"{len(drawn)} of {len(everything)} mutants", flush=True)
    is_good = True
    for module in args.modules:
        start = time.monotonic()
        if is_noticed(None, module, TIMEOUT_S):
            print(f"{module}: the unit tests fail without a change")
            return 1
        timeout_s = 5 + _PATIENCE * (time.monotonic() - start)
        of_module = [mutant for mutant in drawn if mutant.module == module]
        counted = [mutant for mutant in of_module if mutant.key not in EQUIVALENT]
        survivors = []
        for mutant in counted:
            start, noticed = time.monotonic(), is_noticed(mutant, module, timeout_s)
            if not noticed:
                survivors.append(mutant)
            if args.verbose or not noticed:
                print(
                    f"{'noticed' if noticed else 'SURVIVED'} {module}.py:{mutant.line} "
                    f"[{mutant.change}] {mutant.text} ({time.monotonic() - start:.1f} s)",
                    flush=True,
                )
        score = 1 - len(survivors) / max(len(counted), 1)
        is_good &= score >= GOAL
        print(
            f"{module}: {100 * score:.1f} % of {len(counted)} mutants noticed, "
            f"{len(of_module) - len(counted)} equivalent left out",
            flush=True,
        )
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
