"""How long files and functions may be, and how many parameters a function may have: what fits a screen is read.

A function's lines are those of its body, without docstring and signature. Kernels have other limits: constants of a
launch are parameters, and a loop that is pipelined cannot be cut.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WINGS = ("paged_backend", "kernels", "client", "model_repository")
MOST_LINES = 400
MOST_BODY_LINES, MOST_KERNEL_LINES = 60, 100
MOST_PARAMETERS = 8
KERNEL_DECORATORS = ("kernel", "triton.jit")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def functions(tree: ast.AST) -> Iterator[Function]:
    """Those in others too. No expression has one: they, most of a tree, are left out."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        inside = getattr(tree, name, ())
        for node in inside if isinstance(inside, list) else ():
            if isinstance(node, Function):
                yield node
            yield from functions(node)


def body_lines(function: Function) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def num_parameters(function: Function) -> int:
    """Without self and cls; *args and **kwargs count."""
    named = function.args
    names = [argument.arg for argument in (*named.posonlyargs, *named.args, *named.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + (named.vararg is not None) + (named.kwarg is not None)


def is_kernel(function: Function) -> bool:
    return any(ast.unparse(decorator).split("(")[0] in KERNEL_DECORATORS for decorator in function.decorator_list)


def test_the_measures_are_what_they_say() -> None:
    tree = ast.parse(
        'class A:\n    def f(\n        self, a, *b, c=1, **d\n    ):\n        """Says."""\n        x = 1\n\n'
        "        return x\n\n@kernel(ints=[])\ndef k(a, B): pass\n"
    )
    method, kernel = sorted(functions(tree), key=lambda function: function.lineno)
    assert (body_lines(method), num_parameters(method), is_kernel(method)) == (3, 4, False)
    assert (body_lines(kernel), num_parameters(kernel), is_kernel(kernel)) == (1, 2, True)


@pytest.mark.parametrize("folders", [(*WINGS, "tools"), ("tests",)])
def test_a_file_can_be_read_at_a_sitting(folders: tuple[str, ...]) -> None:
    found = files(*folders)
    assert len(found) > 20
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in found}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_a_function_fits_a_screen_and_takes_few_things() -> None:
    too_long, too_many = {}, {}
    for path in files(*WINGS, "tools", "tests"):
        for function in functions(ast.parse(path.read_text())):
            name = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
            length = body_lines(function)
            if length > MOST_BODY_LINES and (length > MOST_KERNEL_LINES or not is_kernel(function)):
                too_long[name] = length
            if num_parameters(function) > MOST_PARAMETERS and not name.startswith(("kernels/", "tools/", "tests/")):
                too_many[name] = num_parameters(function)
    assert (too_long, too_many) == ({}, {})
