"""Conversations as text: by a tokenizer's chat template, or by a plain one where it has none."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache

from ..config import InputError
from ..data import Tokenizer

Messages = list[dict]
# transformers' mark of what an assistant says, which no other reader of templates knows.
_MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def _refuse(message: str):
    raise InputError(f"chat template: {message}")


@cache
def _compiled(template: str):
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # As transformers has it: the same template gives the same text.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(_MARK.sub("", template))
    except TemplateError as error:
        raise InputError(f"chat template: {' '.join(str(error).split())}") from error


def _by_template(messages: Messages, tokenizer: Tokenizer, *, ask: bool) -> str:
    """``messages`` by the tokenizer's template; ``ask``: up to where the assistant's next message begins."""
    from jinja2 import TemplateError

    names = {f"{role}_token": tokenizer.token(index) for role, index in tokenizer.special_tokens.items()}
    try:
        return _compiled(tokenizer.chat_template).render(messages=messages, add_generation_prompt=ask, **names)
    except TemplateError as error:
        raise InputError(f"chat template: {' '.join(str(error).split())}") from error


def _rest(whole: str, start: str) -> str:
    """What ``whole`` has after ``start``."""
    if not whole.startswith(start):
        raise InputError(
            "chat template: the text before an answer changes with the answer, so its tokens cannot be told; "
            f"expected a beginning of {start[-40:]!r}"
        )
    return whole[len(start) :]


def _check_content(messages: Messages, tokenizer: Tokenizer) -> None:
    for message in messages:
        found = tokenizer.special_in(message["content"])
        if found is not None:
            raise InputError(f"chat template: a {message['role']}'s message holds the special token {found!r}")


def plain_text(messages: Messages) -> str:
    """``messages`` without a template: a line with the role, the text, an empty line."""
    return "".join(f"### {message['role'].capitalize()}\n{message['content']}\n\n" for message in messages)


PLAIN_ASK = "### Assistant\n"


def answers_of(messages: Messages, tokenizer: Tokenizer) -> list[list]:
    """(text, whether it is an answer) of a conversation, up to the last answer; the texts together are the whole.

    Raises:
        InputError: the template does not serve, or a message holds a special token.
    """
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if tokenizer.chat_template is None:
        parts, begin = [], 0
        for place in places:
            parts += [[plain_text(messages[begin:place]) + PLAIN_ASK, False], [messages[place]["content"], True]]
            begin = place + 1
        return parts
    _check_content(messages, tokenizer)
    parts, done = [], ""
    for place in places:
        ask = _by_template(messages[:place], tokenizer, ask=True)
        told = _by_template(messages[: place + 1], tokenizer, ask=False)
        parts += [[_rest(ask, done), False], [_rest(told, ask), True]]
        done = told
    return parts


def prompt_of(messages: Messages, answers: Sequence[str], tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """The text of ``messages`` up to where an answer begins, and those of the answers.

    Raises:
        InputError: the template does not serve, or a text holds a special token.
    """
    replies = [{"role": "assistant", "content": answer} for answer in answers]
    if tokenizer.chat_template is None:
        return plain_text(messages) + PLAIN_ASK, list(answers)
    _check_content([*messages, *replies], tokenizer)
    ask = _by_template(messages, tokenizer, ask=True)
    return ask, [_rest(_by_template([*messages, reply], tokenizer, ask=False), ask) for reply in replies]
