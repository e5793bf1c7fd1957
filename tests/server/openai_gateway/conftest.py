"""One server and one gateway for all files here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from paged_backend.config import demo_model_folder
from paged_backend.server.launch import Server, ServerSettings
from tests.server.served import served

if TYPE_CHECKING:
    from tests.server.gateway_process import Gateway

TEMPLATE = """{{ bos_token }}{% for tool in tools or [] %}tool: {{ tool.function.name }}
{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "talker"
    shutil.copytree(demo_model_folder(), checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    _add_tokens(checkpoint / "tokenizer.json", "<pad>", "<added>")
    with served(
        ServerSettings(model=str(checkpoint), instances=1, options={"num_pages": 200, "dtype": "float32"})
    ) as running:
        yield running


def _add_tokens(path: Path, special: str, plain: str) -> None:
    """That the tokenizer knows and the model has no embedding of."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([special])
    tokenizer.add_tokens([plain])
    tokenizer.save(str(path))


@pytest.fixture(scope="package")
def gateway(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    from tests.server.gateway_process import gateway_to  # which skips where the gateway's libraries are not

    with gateway_to(server.addresses.grpc_url, tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Any]:
    with gateway.client() as made:
        yield made
