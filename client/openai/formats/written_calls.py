"""Calls in notations that are read as a whole."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable


def pythonic_calls(text: str, names: Iterable[str] = ()) -> list[tuple[str, str]]:
    """`[f(a=1), g(b="x")]` → name and arguments as JSON of each.

    names: of tools, which need not be Python's.

    Raises:
        ValueError: it is something else.
        SyntaxError: it is no Python.
    """
    stand_ins: dict[str, str] = {}  # the names that are no Python, by what is read for them
    for name in sorted(names, key=len, reverse=True):
        if name in text and not all(part.isidentifier() for part in name.split(".")):
            stand_in = f"_stand_in_{len(stand_ins)}_"
            stand_ins[stand_in] = name
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?=\()", stand_in, text)
    tree = ast.parse(text.strip(), mode="eval").body
    nodes = tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]
    if not nodes:
        raise ValueError("no calls")
    found = []
    for node in nodes:
        if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("not a call with named arguments")
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        try:
            said = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except TypeError:
            raise ValueError("a value that JSON has not") from None
        name = ast.unparse(node.func)
        for stand_in, meant in stand_ins.items():  # in an argument it was a text that looked like a call
            said = said.replace(stand_in, json.dumps(meant, ensure_ascii=False)[1:-1])
        found.append((stand_ins.get(name, name), said))
    return found


_GEMMA_QUOTE = '<|"|>'
_GEMMA_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w.-]*)(\s*:)")


def gemma_call(text: str) -> list[tuple[str, str]]:
    """`call:f{a:<|"|>x<|"|>,n:1}` → name and arguments as JSON.

    Raises:
        ValueError: it is something else.
    """
    head, brace, body = text.strip().partition("{")
    if not head.startswith("call:") or not brace:
        raise ValueError("not a call")
    pieces = (brace + body).split(_GEMMA_QUOTE)
    # Strings are put aside while the keys get their quotation marks: every other piece is one.
    plain = '"'.join(piece if at % 2 == 0 else f"\x00{at}\x00" for at, piece in enumerate(pieces))
    quoted = _GEMMA_KEY.sub(r'\1"\2"\3', plain)
    whole = re.sub('"\x00(\\d+)\x00"', lambda found: json.dumps(pieces[int(found[1])], ensure_ascii=False), quoted)
    return [(head.removeprefix("call:").strip(), json.dumps(json.loads(whole), ensure_ascii=False))]
