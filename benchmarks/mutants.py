"""A mutation pass: break a module in every small way, one at a time, and see whether its tests notice.

    python benchmarks/mutants.py src/fedloom/alignment.py tests/test_alignment.py [--every 6] [--lines 84-251] [-k gain]

Mutants: an operator, a comparison or a boolean turned into its neighbour, a number moved by one, the order of arguments
turned, a condition negated, a statement left out. Texts, annotations and defaults of fields are left alone. Tests are
collected once; each mutant then runs in a child of that process, in which the module's functions have the broken code,
against the tests that come to its line, quick ones first, until one fails. Survivors are printed. Arguments that are
unknown here go to pytest. What runs while tests are imported, or in other processes, is not seen.
"""

import argparse
import ast
import copy
import gc
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
import torch

SECONDS = 300  # after which a test counts as failed
OUT = os.dup(1)  # pytest takes the other
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitOr: ast.BitAnd,
}


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], None]]]:
    """What may be done to a copy of this node."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield f"{type(node.op).__name__} swapped", lambda n: setattr(n, "op", SWAPS[type(n.op)]())  # type: ignore[attr-defined]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield f"{type(node.ops[0]).__name__} swapped", lambda n: setattr(n, "ops", [SWAPS[type(n.ops[0])]()])  # type: ignore[attr-defined]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign dropped", lambda n: setattr(n, "op", ast.UAdd())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield f"{node.value} + 1", lambda n: setattr(n, "value", n.value + 1)  # type: ignore[attr-defined]
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield f"not {node.value}", lambda n: setattr(n, "value", not n.value)  # type: ignore[attr-defined]
    if isinstance(node, ast.If | ast.IfExp):
        yield "condition negated", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))  # type: ignore[attr-defined]
    if isinstance(node, ast.Call) and len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args):
        yield "arguments swapped", lambda n: n.args.reverse()  # type: ignore[attr-defined]
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Expr | ast.Raise) and not _is_text(node):
        yield "left out", lambda n: n.__dict__.update(_left_out=True)


def mutants(source: str) -> Iterator[tuple[range, str, str]]:
    """(the lines of the statement, what was done, the module's text), one change each."""
    tree = ast.parse(source)
    spans = _spans(tree)
    for index, node in enumerate(_nodes(tree)):
        for number, (what, _) in enumerate(changes(node)):
            changed = copy.deepcopy(tree)
            twin = list(_nodes(changed))[index]
            list(changes(twin))[number][1](twin)
            changed = ast.fix_missing_locations(_Dropped().visit(changed))
            shown = ast.unparse(node).partition("\n")[0]
            yield spans[id(node)], f"{what} in {shown[:80]}", ast.unparse(changed)


class _Dropped(ast.NodeTransformer):
    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        return ast.copy_location(ast.Pass(), node) if getattr(node, "_left_out", False) else node


def _nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Everything inside functions, but their annotations and texts."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns", "decorator_list"):
            for part in ast.walk(ast.Module([p for p in [getattr(node, field, None)] if isinstance(p, ast.AST)], [])):
                skipped.add(id(part))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node)}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                for node in ast.walk(statement):
                    if id(node) not in skipped:
                        skipped.add(id(node))
                        yield node


def _spans(tree: ast.Module) -> dict[int, range]:
    """For each node, the lines of the statement that it is in; of a compound one, those of its head."""
    spans: dict[int, range] = {}
    for statement in ast.walk(tree):  # outer ones first
        if isinstance(statement, ast.stmt):
            body = getattr(statement, "body", None)
            end = body[0].lineno if body else (statement.end_lineno or statement.lineno) + 1
            span = range(statement.lineno, max(end, statement.lineno + 1))
            spans |= {id(node): span for node in ast.walk(statement)}
    return spans


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


class Pass:
    """A pytest plugin that runs the collected tests once whole, then once for each mutant."""

    def __init__(self, module: Path, every: int, lines: range) -> None:
        self.module, self.file = module, str(module.resolve())
        tried = [mutant for mutant in mutants(module.read_text()) if mutant[0].start in lines]
        self.tried, self.survivors = tried[::every], 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        with tempfile.NamedTemporaryFile("r") as seen:
            if not in_child(lambda: self.watched(session, Path(seen.name))):
                pytest.exit("The tests fail before anything is broken.", 1)
            tests = json.load(seen)
        self.functions = [function for function in gc.get_objects() if self._is_ours(function)]
        gc.freeze()  # children do not touch what they share
        for span, what, text in self.tried:
            chosen = sorted((seconds, i) for i, (seconds, lines) in enumerate(tests) if {*lines} & {*span})
            items = [session.items[i] for _, i in chosen]
            if in_child(lambda items=items, text=text: self.broken(text) or run(session, items)):  # type: ignore[misc]
                self.survivors += 1
                say(f"{self.module}:{span.start}: {what}{'' if items else ' (no test comes here)'}")
        return True

    def watched(self, session: pytest.Session, seen: Path) -> bool:
        """Run all tests, and write down for each its seconds and the module's lines that it comes to."""
        lines, told = set[int](), []

        def line(frame: FrameType, event: str, _: object) -> Any:
            lines.add(frame.f_lineno)
            return line

        def call(frame: FrameType, event: str, _: object) -> Any:
            return line if frame.f_code.co_filename == self.file else None

        threading.settrace(call)
        sys.settrace(call)
        for item in session.items:
            lines.clear()
            start = time.perf_counter()
            if not run(session, [item]):
                say(f"{item.nodeid} fails")
                return False
            told.append((time.perf_counter() - start, sorted(lines)))
        seen.write_text(json.dumps(told))
        return True

    def broken(self, text: str) -> None:
        """Put the code of a changed module into the functions of the one that was imported."""
        codes = {code.co_qualname: code for code in _codes(compile(text, self.file, "exec"))}
        for function in self.functions:
            function.__code__ = codes[function.__code__.co_qualname]

    def _is_ours(self, thing: object) -> bool:
        """Whether it is a function of the module, and not one that was made inside another."""
        if type(thing) is not FunctionType or thing.__code__.co_filename != self.file:
            return False
        return "<locals>" not in thing.__qualname__


def _codes(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _codes(inner)


def run(session: pytest.Session, items: list[pytest.Item]) -> bool:
    """Whether all of these pass; stops where one fails."""
    for item, following in itertools.pairwise([*items, None]):
        signal.alarm(SECONDS)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return False
    return True


def in_child(job: Callable[[], bool]) -> bool:
    """What the job says, done in a child; False where it hangs or dies."""
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if job() else 1)
        except BaseException:
            say(traceback.format_exc())
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def say(text: str) -> None:
    os.write(OUT, f"{text}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path)
    parser.add_argument("--every", type=int, default=1, help="only one mutant in so many")
    parser.add_argument("--lines", default="1-9999", help="only those of these lines")
    args, tests = parser.parse_known_args()
    torch.set_num_threads(1)
    first, last = map(int, args.lines.split("-"))
    plugin = Pass(args.module, args.every, range(first, last + 1))
    with tempfile.TemporaryDirectory() as folder:
        options = ["-p", "no:cacheprovider", "-p", "no:terminal", f"--basetemp={folder}/tmp"]
        status = pytest.main([*options, *tests], [plugin])
    if status:
        sys.exit(int(status))
    print(f"{len(plugin.tried)} mutants of {args.module}, {plugin.survivors} survived {' '.join(tests)}")
    sys.exit(bool(plugin.survivors))


if __name__ == "__main__":
    main()
