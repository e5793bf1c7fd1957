"""`/v1/score` and `/v1/rerank`, as vLLM, Jina and Cohere have them: how well texts match, by their embeddings or by
asking the model.

cosine: of the two embeddings. yes_no: the model is asked whether the document answers the query, in the words that
Qwen3-Reranker was trained on; the score is the probability of "yes" where only "yes" and "no" can be said.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from paged_client.answers import Answer
from paged_client.errors import PagedError
from paged_client.openai.embeddings_api import EmbeddingSource, PoolingBody, json_response, usage_of
from paged_client.openai.errors import RefusalError, refusal_of
from paged_client.openai.middleware import REQUEST_ID
from paged_client.openai.protocol import MAX_PROMPTS
from paged_client.openai.unknown_keys import unused_keys, with_warning

SCORE_PATHS = ("/v1/score", "/score")
RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
SCORINGS = ("cosine", "yes_no")
# keys that mean nothing where the model is asked
_OF_EMBEDDINGS = ("pooling", "truncate_prompt_tokens", "add_special_tokens")
# As the model card of Qwen3-Reranker has them.
_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that "
    'the answer can only be "yes" or "no".'
)
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1)]


class RankingBody(PoolingBody):
    """What both share."""

    scoring: Literal["cosine", "yes_no"] | None = None  # None: as the gateway was told
    instruction: str | None = None  # with yes_no: what the document is to do for the query


class ScoreBody(RankingBody):
    """POST /v1/score: one text with one or several, or as many with as many."""

    text_1: Text | Texts
    text_2: Text | Texts


class Document(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    text: Text


class RerankBody(RankingBody):
    """POST /v1/rerank."""

    query: Text
    documents: Annotated[list[Text | Document], Field(fail_fast=True, min_length=1)]
    top_n: Annotated[int, Field(ge=0)] | None = None  # 0, as vLLM has it: all
    return_documents: bool | None = None  # False: their numbers alone


def checked_scoring(name: str) -> str:
    """
    Raises:
        ValueError: there is no such way.
    """
    if name not in SCORINGS:
        raise ValueError(f"--scoring {name}: expected one of {', '.join(SCORINGS)}")
    return name


def add_ranking_paths(app: FastAPI, source: EmbeddingSource, strict: bool, scoring: str) -> None:
    """scoring: of bodies that do not say, one of SCORINGS."""

    async def score(body: ScoreBody, request: Request) -> Response:
        unused = unused_keys(body, strict)
        pairs = _pairs(body.text_1, body.text_2)
        scores, answers = await _scores(source, request, body, pairs, scoring, "text_2")
        entries = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
        head = {
            "id": f"score-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
        }
        return with_warning(json_response({**head, "data": entries, "usage": usage_of(answers)}), unused)

    async def rerank(body: RerankBody, request: Request) -> Response:
        unused = unused_keys(body, strict)
        documents = [document if isinstance(document, str) else document.text for document in body.documents]
        if len(documents) > MAX_PROMPTS:
            raise RefusalError(
                f"documents: {len(documents)} documents; the most allowed is {MAX_PROMPTS}", param="documents"
            )
        pairs = [(body.query, document) for document in documents]
        scores, answers = await _scores(source, request, body, pairs, scoring, "documents")
        order = sorted(range(len(documents)), key=lambda index: -scores[index])[: body.top_n or len(documents)]
        shown = [{} if body.return_documents is False else {"document": {"text": documents[index]}} for index in order]
        results = [
            {"index": index, **text, "relevance_score": scores[index]} for index, text in zip(order, shown, strict=True)
        ]
        said = {
            "id": f"rerank-{secrets.token_hex(12)}",
            "model": body.model,
            "usage": usage_of(answers),
            "results": results,
        }
        return with_warning(json_response(said), unused)

    for path in SCORE_PATHS:
        app.post(path)(score)
    for path in RERANK_PATHS:
        app.post(path)(rerank)


def _pairs(first: str | list[str], second: str | list[str]) -> list[tuple[str, str]]:
    firsts = [first] if isinstance(first, str) else first
    seconds = [second] if isinstance(second, str) else second
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise RefusalError(
            f"text_2: {len(seconds)} texts for {len(firsts)}; expected as many, or one text_1", param="text_2"
        )
    if len(seconds) > MAX_PROMPTS:
        raise RefusalError(f"text_2: {len(seconds)} texts; the most allowed is {MAX_PROMPTS}", param="text_2")
    return list(zip(firsts, seconds, strict=True))


async def _scores(
    source: EmbeddingSource,
    request: Request,
    body: RankingBody,
    pairs: Sequence[tuple[str, str]],
    scoring: str,
    param: str,
) -> tuple[list[float], list[Answer]]:
    """A score for each pair, and what was asked for them. param: the field of the body that the texts are in."""
    params = dict.fromkeys(("text_input", "input_ids", "messages"), param) | {"priority_level": "priority"}
    if (body.scoring or scoring) == "yes_no":
        return await _answered_scores(source, request, body, pairs, params)
    if body.instruction is not None:
        raise RefusalError("instruction: only with scoring yes_no; put it before the query", param="instruction")
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    answers = await source.embeddings(request, body, texts, params)
    found = dict(zip(texts, (answer.embedding for answer in answers), strict=True))
    return [_dot(found[first], found[second]) for first, second in pairs], answers


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    """The cosine: embeddings have length 1."""
    return math.fsum(a * b for a, b in zip(first, second, strict=True))


async def _answered_scores(
    source: EmbeddingSource,
    request: Request,
    body: RankingBody,
    pairs: Sequence[tuple[str, str]],
    params: dict[str, str],
) -> tuple[list[float], list[Answer]]:
    """By two beams of one token each, which may be "yes" or "no" alone: their log-probabilities are those of the whole
    vocabulary, exactly.
    """
    for name in _OF_EMBEDDINGS:
        if getattr(body, name) is not None:
            raise RefusalError(f"{name}: not with scoring yes_no", param=name)
    card = source.card(body)
    try:
        yes, no = await card.token_of("yes"), await card.token_of("no")
    except PagedError as error:
        raise refusal_of(error, params) from None
    if yes is None or no is None:
        raise RefusalError(
            "scoring: the model's tokenizer spells yes or no in several tokens: use cosine", param="scoring"
        )
    search = {
        "use_beam_search": True,
        "beam_width": 2,
        "n": 2,
        "max_tokens": 1,
        "allowed_token_ids": [yes, no],
        "logprobs": 0,
        "ignore_eos": True,
    }
    template = {"chat_template_kwargs": {"enable_thinking": False}}
    sampling = {**source.sampling(body), **search, **template, "request_id": request.scope.get(REQUEST_ID, "")}
    instruction = _INSTRUCTION if body.instruction is None else body.instruction

    async def ask(pair: tuple[str, str]) -> Answer:
        asked = f"<Instruct>: {instruction}\n<Query>: {pair[0]}\n<Document>: {pair[1]}"
        messages = [{"role": "system", "content": _JUDGE}, {"role": "user", "content": asked}]
        return await card.client.generate(messages=messages, **sampling)

    answers = await source.answers(request, pairs, ask, params)
    return [_probability(answer, yes) for answer in answers], answers


def _probability(answer: Answer, yes: int) -> float:
    """Of the token `yes` against the only other."""
    logprobs = {sequence.token_ids[0]: sequence.logprobs[0][0].logprob for sequence in answer.sequences}
    other = next(logprob for token_id, logprob in logprobs.items() if token_id != yes)
    return 1 / (1 + math.exp(min(other - logprobs[yes], 700)))
