"""Calls in notations that are read as a whole."""

from __future__ import annotations

import ast
import json
import re


def pythonic_calls(text: str) -> list[tuple[str, str]]:
    """`[f(a=1), g(b="x")]` → name and arguments as JSON of each.

    Raises:
        ValueError: it is something else.
        SyntaxError: it is no Python.
    """
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
            found.append((ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False)))
        except TypeError:
            raise ValueError("a value that JSON has not") from None
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
