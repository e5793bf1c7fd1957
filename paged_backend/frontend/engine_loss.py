"""What becomes of a model that will have no engine any more. It refuses every request, and must not look ready
meanwhile.

Triton Server asks a model's `is_ready` from 26.03 on only. Older servers can be told through their model control API to
unload the model, or to end.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
from typing import Literal

from paged_backend.frontend.shutdown_watch import ServerArguments

_ANSWER_SECONDS = 10.0
_SAY_UNLOAD = "it stays loaded and refuses every request; an operator must load it again or restart the server"

log = logging.getLogger("paged")


def leave_server(action: Literal["unload", "exit", "stay"], server: ServerArguments, pid: int, model: str) -> None:
    """Does what the option `on_engine_loss` says, once. Returns before it is done: the unloading waits for every
    request to have its final response.

    server, pid: Triton Server's command line and process.
    """
    if action == "unload":
        refusal = _unload(server, model)
        if refusal is None:
            log.error(
                "error: the model is unloaded, for there is no engine any more; it is ready again once it was "
                "loaded through the model control API"
            )
        else:
            log.error("error: the server does not unload the model (%s): %s", refusal, _SAY_UNLOAD)
    elif action == "exit":
        log.error("error: the server ends, for there is no engine any more (on_engine_loss)")
        os.kill(pid, signal.SIGTERM)
    else:
        log.error("error: the model has no engine any more: %s", _SAY_UNLOAD)


def _unload(server: ServerArguments, model: str) -> str | None:
    """None if the server unloads the model, else why it does not."""
    if server.http is None:
        return "it has no HTTP port"
    connection = http.client.HTTPConnection(*server.http, timeout=_ANSWER_SECONDS)
    try:
        connection.request(
            "POST",
            f"/v2/repository/models/{model}/unload",
            b"{}",
            {"Content-Type": "application/json", **server.control_headers},
        )
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return None if answer.status == 200 else f"{answer.status}: {_message(body)}"


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
