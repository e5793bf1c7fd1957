"""What is said of the gateway itself: its health, version and metrics."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from paged_client.openai.errors import RefusalError
from paged_client.openai.metrics import CONTENT_TYPE, GatewayMetrics
from paged_client.openai.middleware import response_of
from paged_client.openai.models import Models


def add_status_paths(app: FastAPI, models: Models, metrics: GatewayMetrics) -> None:
    async def health() -> Response:
        if await models.takes_requests():
            return JSONResponse({"status": "ok"})
        return response_of(
            RefusalError(
                "the server is not there, has not loaded the model, or the model has lost its engine",
                503,
                code="not_ready",
            )
        )

    for path, methods in (("/health", ("GET", "HEAD")), ("/v1/health", ("GET", "HEAD")), ("/ping", ("GET", "HEAD"))):
        for method in methods:  # one route each: a route of several has one operation id in the schema for all of them
            app.add_api_route(path, health, methods=[method], include_in_schema=method == "GET")

    @app.api_route("/", methods=["HEAD"], include_in_schema=False)
    async def found() -> Response:
        return Response()  # Anthropic's agents look whether anybody listens

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": installed_version()})

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(await metrics.text(), media_type=CONTENT_TYPE)


def installed_version() -> str:
    try:
        return version_of("paged-backend")
    except PackageNotFoundError:
        return "unknown"
