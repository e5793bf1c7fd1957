"""Which form a chat's answer has: from the model's chat template, what the caller asked for, and the gateway's
options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paged_client.errors import InvalidRequestError
from paged_client.openai.errors import RefusalError
from paged_client.openai.formats.families import (
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
    reasoning_format_of,
    tool_format_of,
    types_of,
)
from paged_client.openai.formats.harmony import ANALYSIS as HARMONY_ANALYSIS
from paged_client.openai.formats.harmony import END as HARMONY_END
from paged_client.openai.formats.harmony import as_template_has_them
from paged_client.openai.formats.parser import AnswerForm
from paged_client.openai.model_card import Description, ModelCard
from paged_client.openai.protocol import ChatBody
from paged_client.openai.tools import ToolWishes, format_for, structural_tag
from paged_client.openai.translation import Asked, template_kwargs

_TOOLS_TEMPLATE = "tool_use"


@dataclass(frozen=True)
class FormOptions:
    """Of the gateway."""

    tools: str = "auto"  # a name of TOOL_FORMATS, "template", "none"; auto: what the chat template says
    reasoning: bool = True  # told apart from content

    def check(self) -> None:
        """
        Raises:
            ValueError: there is no such format.
        """
        known = ("auto", "none", "template", *TOOL_FORMATS)
        if self.tools not in known:
            raise ValueError(f"--tool-format {self.tools}: expected one of {', '.join(known)}")


@dataclass(frozen=True)
class ChatForm:
    """How a chat's answer is read."""

    answer: AnswerForm
    parallel: bool = True
    tells_reasoning: bool = True
    closer_id: int | None = None  # the token that ends reasoning, if it is one
    # what begins it where the model writes that itself, as far as it is told by tokens
    opener_ids: tuple[int, ...] = ()
    num_opening: int = 0  # tokens that begin it, which are no thoughts yet

    @property
    def reasons(self) -> bool:
        """Whether the model's answers may have reasoning."""
        return self.answer.reasoning is not None or _is_harmony(self.answer.tools)


async def chat_form(card: ModelCard, options: FormOptions, body: ChatBody, wishes: ToolWishes | None) -> ChatForm:
    """
    Raises:
        PagedError: the model cannot be asked.
    """
    description = await card.description()
    templates = description.chat_templates
    template = templates.get(_TOOLS_TEMPLATE, "") if wishes is not None else ""
    template = template or templates.get("default", "")
    tools = _tool_format(options, template)
    if wishes is not None:
        tools = format_for(wishes, tools)
    elif not _is_harmony(tools):  # whose answers are messages with or without tools
        tools = None
    reasoning = reasoning_format_of(template) if options.reasoning else None
    end = await _prompt_end(card, body) if reasoning is not None or description.response_template is not None else ""
    form = AnswerForm(
        tools=tools,
        reasoning=reasoning,
        begins_reasoning=reasoning is not None and end.rstrip().endswith(reasoning.opener.rstrip()),
        types=types_of(wishes.tools) if wishes is not None else {},
        dropped=_dropped(tools, reasoning, description, body),
        template=description.response_template if _follows_template(options, wishes) else None,
        prompt_end=end,
    )
    opening, closing = _reasoning_words(form)
    openers = [await card.token_of(word) for word in opening]
    known = tuple(found for found in openers if found is not None)
    return ChatForm(
        form,
        wishes is None or wishes.parallel,
        body.include_reasoning is not False,
        closer_id=await card.token_of(closing) if closing else None,
        # the last of harmony's three only ends a header that the others tell
        opener_ids=known[:2] if len(known) == len(openers) else (),
        num_opening=len(openers),
    )


def _reasoning_words(form: AnswerForm) -> tuple[tuple[str, ...], str]:
    """What begins reasoning, a token each, and what ends it; "": nothing does."""
    if _is_harmony(form.tools):
        return HARMONY_ANALYSIS, HARMONY_END
    if form.reasoning is None:
        return (), ""
    return (form.reasoning.opener.strip(),), form.reasoning.closer


def within_budget(asked: Asked, body: ChatBody, form: ChatForm) -> Asked:
    """With the caller's limit on reasoning, which the server keeps. A model that does not reason keeps any.

    Raises:
        RefusalError: where its reasoning begins or ends cannot be told by a token.
    """
    name = "max_thinking_tokens" if body.max_thinking_tokens is not None else "thinking_token_budget"
    budget = getattr(body, name)
    if budget is None or not form.reasons:
        return asked
    begun = form.answer.begins_reasoning
    if form.closer_id is None or not (begun or form.opener_ids):
        raise RefusalError(
            f"{name}: this model's reasoning does not begin and end with a token of its own, so it cannot be ended",
            param=name,
        )
    keys = {
        "max_thinking_tokens": budget if begun else budget + form.num_opening,
        "end_thinking_token_id": form.closer_id,
        "start_thinking_token_ids": None if begun else form.opener_ids,
    }
    return replace(asked, sampling={**asked.sampling, **keys}, params={**asked.params, "max_thinking_tokens": name})


def constrained(asked: Asked, wishes: ToolWishes | None, form: ChatForm) -> Asked:
    """With what the server must know: the calls' form, whether markers are to be seen, and the messages as the
    template has them.

    Raises:
        RefusalError: the answer has another form already.
    """
    sampling = dict(asked.sampling)
    params = dict(asked.params)
    if form.answer.dropped or form.answer.template is not None or _is_harmony(form.answer.tools):
        sampling["skip_special_tokens"] = False
    if asked.messages is not None and _is_harmony(form.answer.tools):
        asked = replace(asked, messages=as_template_has_them(asked.messages))
    if wishes is not None and wishes.enforces:
        taken = [
            name for name in sampling if name.startswith(("guided_", "structured_")) and sampling[name] is not None
        ]
        if taken:
            name = params.get(taken[0], taken[0])
            raise RefusalError(
                f"{name}: not together with tools that must be called: an answer has one form", param=name
            )
        assert form.answer.tools is not None
        tag = structural_tag(wishes, form.answer.tools, form.answer.begins_reasoning)
        sampling["structured_outputs"] = {"structural_tag": tag}
        params["structured_outputs"] = "tools"
    return replace(asked, sampling=sampling, params=params)


def _tool_format(options: FormOptions, template: str) -> ToolFormat | None:
    return tool_format_of(template) if options.tools in ("auto", "template") else TOOL_FORMATS.get(options.tools)


def _follows_template(options: FormOptions, wishes: ToolWishes | None) -> bool:
    """What is enforced has the format's own form; else the checkpoint's template knows best."""
    return options.tools in ("auto", "template") and (wishes is None or not wishes.enforces)


def _is_harmony(tools: ToolFormat | None) -> bool:
    return tools is not None and tools.name == "harmony"


async def _prompt_end(card: ModelCard, body: ChatBody) -> str:
    if body.continue_final_message:
        return ""
    try:
        return await card.prompt_end(template_kwargs(body))
    except InvalidRequestError:  # whatever is wrong, the request itself is refused for it
        return ""


def _dropped(
    tools: ToolFormat | None, reasoning: ReasoningFormat | None, description: Description, body: ChatBody
) -> tuple[str, ...]:
    """Special words that come with the markers once special tokens are not skipped; none: no marker is special."""
    markers: set[str] = set() if tools is None else {*tools.openers, *tools.ignored}
    if reasoning is not None:
        markers |= {reasoning.opener.strip(), reasoning.closer}
    if not any(word in marker for marker in markers for word in description.special_words):
        return ()
    if body.skip_special_tokens is False:
        return ()
    return tuple(word for word in description.special_words if word not in markers)


def reasoning_tokens(form: ChatForm, num_tokens: int, num_until_closed: int | None, begun: bool) -> int | None:
    """How many of an answer's tokens are reasoning, its closing one included; None: it cannot be told.

    num_until_closed: those up to the first `closer_id`; None: there is none. begun: something was reasoning.
    """
    if form.closer_id is None or (_is_harmony(form.answer.tools) and not begun):  # whose other messages end alike
        return None if begun else 0
    if num_until_closed is not None:
        return num_until_closed
    return num_tokens if begun else 0
