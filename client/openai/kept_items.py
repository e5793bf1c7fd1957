"""Items of the Responses API as they are kept: each has an id, by which later requests name it and lists go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paged_client.openai.errors import RefusalError
from paged_client.openai.response_store import ResponseStore

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def item_id(kind: str, response_id: str, place: str) -> str:
    """place: of the item in its response. The id tells the response, by which the item is found again."""
    return f"{_PREFIXES.get(kind, 'item')}_{response_id.partition('_')[2]}_{place}"


def kept(items: Sequence[Mapping[str, Any]], response_id: str) -> list[dict[str, Any]]:
    """A body's items with everything that OpenAI's lists of them have."""
    return [_kept(item, response_id, position) for position, item in enumerate(items)]


def _kept(item: Mapping[str, Any], response_id: str, position: int) -> dict[str, Any]:
    kind = item.get("type") or "message"
    whole = {**item, "type": kind, "status": item.get("status") or "completed"}
    if not isinstance(item.get("id"), str):
        whole["id"] = item_id(kind, response_id, f"in{position}")
    if kind == "message" and isinstance(item.get("content"), str):
        of_model = item.get("role") == "assistant"
        part = {"type": "output_text", "annotations": []} if of_model else {"type": "input_text"}
        whole["content"] = [{**part, "text": item["content"]}]
    return whole


def given_items(given: str | Sequence[Mapping[str, Any]], store: ResponseStore) -> list[Mapping[str, Any]]:
    """A body's input as items, those in full that it only names.

    Raises:
        RefusalError: one of these is not kept, or not any more, or is named twice.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    known: dict[str, dict[str, dict[str, Any]]] = {}  # responses that were looked up, and their items, by id
    items = []
    for position, item in enumerate(given):
        named = item.get("id")
        if not _is_reference(item) or not isinstance(named, str):
            items.append(item)
            continue
        response_id = f"resp_{named.partition('_')[2].rpartition('_')[0]}"
        if response_id not in known:
            known[response_id] = _items_of(store, response_id)
        found = known[response_id].pop(named, None)  # a second time it would only make the prompt longer
        if found is None:
            where, name = f"input.{position}", named[:80]
            reason = f"{where}: there is no item '{name}' here, or not any more, or it is named twice"
            raise RefusalError(reason, 404, param=where, code="item_not_found")
        items.append(found)
    return items


def _is_reference(item: Mapping[str, Any]) -> bool:
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "role" not in item)


def _items_of(store: ResponseStore, response_id: str) -> dict[str, dict[str, Any]]:
    try:
        stored = store.get(response_id)
    except RefusalError:
        return {}
    return {item["id"]: item for item in stored.conversation}


def page_of(items: Sequence[Mapping[str, Any]], *, newest_first: bool, after: str | None, limit: int) -> dict[str, Any]:
    """Some of the items as OpenAI lists them.

    Raises:
        RefusalError: there is no item `after`.
    """
    ordered = list(reversed(items) if newest_first else items)
    start = 0
    if after is not None:
        start = 1 + next((at for at, item in enumerate(ordered) if item["id"] == after), len(ordered))
        if start > len(ordered):
            raise RefusalError(f"after: there is no item '{after[:80]}'", param="after")
    shown = ordered[start : start + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + limit < len(ordered),
    }
