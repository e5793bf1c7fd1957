"""`paged top --web`: one page without anything from elsewhere, and a stream of events for it, on this machine only."""

from __future__ import annotations

import base64
import json
import secrets
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from paged_client.top.engines import Choice, NoEngineError, View, follow
from paged_client.top.history import History, hit_rate_since_start, right_drafts, utilisation

_ADDRESS = "127.0.0.1"
_PAGE = Path(__file__).with_name("page.html")


def serve_page(choice: Choice, port: int) -> None:
    """Serves until Ctrl-C. The engine is watched only while a browser shows the page.

    Raises:
        NoEngineError: the port is taken.
    """
    with page_server(choice, port) as server:
        print(f"paged top: http://{_ADDRESS}:{server.server_port}/ (Ctrl-C stops it)", flush=True)
        server.serve_forever()


def page_server(choice: Choice, port: int) -> PageServer:
    """
    Raises:
        NoEngineError: the port is taken.
    """
    try:
        return PageServer(choice, port)
    except OSError as error:
        raise NoEngineError(
            f"port {port} on {_ADDRESS} cannot be used: {error.strerror}; choose another with --port"
        ) from None


class PageServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, choice: Choice, port: int) -> None:
        super().__init__((_ADDRESS, port), _Visitor)
        self.choice = choice
        self.hosts = {f"{name}:{self.server_port}" for name in (_ADDRESS, "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves is no error."""


class _Visitor(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        # a name of somebody else's that leads here: a page elsewhere wants to read
        if self.headers.get("Host") not in self.server.hosts:
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._send_page()
        elif self.path == "/events":
            self._send_events()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody wants to read it."""

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        page = _PAGE.read_text(encoding="utf-8").replace("NONCE", nonce).encode()
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'"
        )
        self.send_response(HTTPStatus.OK)
        for name, value in {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(page)),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(page)

    def _send_events(self) -> None:
        """Until the browser leaves, which a failing write tells."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        history = History()
        views = follow(self.server.choice)
        try:
            for view in views:
                self.wfile.write(b"data: " + json.dumps(event_of(view, history)).encode() + b"\n\n")
        except OSError:
            pass
        finally:
            views.close()


def event_of(view: View, history: History) -> dict[str, Any]:
    """What the page draws: the snapshot by its fields (cells in base64), and the rates that follow from it and those
    before.
    """
    event: dict[str, Any] = {"pid": None, "model_name": "", "trouble": view.trouble}
    if view.engine is not None:
        event |= {"pid": view.engine.pid, "model_name": view.engine.model_name}
    snapshot = view.snapshot
    if snapshot is None:
        return event
    history.add(snapshot)
    fields = {
        name: getattr(snapshot, name)
        for name in snapshot.__struct_fields__
        if name not in ("cells", "requests", "first_token_seconds", "step_seconds")
    }
    return event | {
        **fields,
        "num_used_cells": history.num_used_cells,
        "cells": base64.b64encode(snapshot.cells).decode(),
        "requests": [msgspec.structs.asdict(request) for request in snapshot.requests],
        "moments": [
            [moment.tokens_per_second, moment.first_token_ms, moment.inter_token_ms]
            for moment in list(history.moments)[-1:]
        ],
        "tokens_per_second": history.tokens_per_second,
        "first_token_ms": history.first_token_ms,
        "inter_token_ms": history.inter_token_ms,
        "hit_rate": history.hit_rate,
        "hit_rate_since_start": hit_rate_since_start(snapshot),
        "right_drafts": right_drafts(snapshot),
        "utilisation": utilisation(snapshot),
    }
