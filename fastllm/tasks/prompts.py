"""Prompts with answers, and prompts with a preferred and a rejected answer, from JSON lines; conversations as text.

An example to learn from is a dict: ``parts``, a list of (text, whether it is an answer), and ``templated``. A pair is
``prompt``, ``chosen``, ``rejected`` and ``templated``. Where that is False an answer ends with an end-of-text token and
the first part follows one. Where it is True the text is a chat template's, which writes its own special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config import InputError, check_encodable
from ..data import Tokenizer
from ..data.corpus import lines_of, read_text
from .chat import answers_of, prompt_of

# The names under which files have a prompt and its answer, in order of preference.
PROMPTS = ("prompt", "instruction", "question")
ANSWERS = ("answer", "completion", "response", "output")
# The two answers of a pair.
SIDES = ("chosen", "rejected")
ROLES = ("system", "user", "assistant", "tool")


def _objects(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, the object) of each line that is not empty."""
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a JSON object, got {line[:40]!r}")
        yield where, value


def _text(value, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: expected a text, got {json.dumps(value)[:40]}")
    check_encodable(value, where)
    if not empty and not value.strip():
        raise InputError(f"{where}: is empty")
    return value


def _messages(value, where: str) -> list[dict]:
    """Messages with a role and a text each; an assistant's is not empty."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a list of messages, got {json.dumps(value)[:40]}")
    for number, message in enumerate(value, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(f"{here}: expected a role among {', '.join(ROLES)} and a content")
        _text(message.get("content"), f"{here}: content", empty=message["role"] != "assistant")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _instruction(value: dict, where: str) -> dict:
    if "messages" in value:
        messages = _messages(value["messages"], f"{where}: messages")
        if all(message["role"] != "assistant" for message in messages):
            raise InputError(f"{where}: messages: no answer to learn: none is an assistant's")
        return {"messages": messages}
    prompt, answer = (next((name for name in names if name in value), None) for names in (PROMPTS, ANSWERS))
    if prompt is None or answer is None:
        missing = "a prompt" if prompt is None else "an answer"
        raise InputError(
            f"{where}: no {missing.split()[1]}: expected {missing} ({', '.join(PROMPTS if prompt is None else ANSWERS)}"
            f"), or messages; got {', '.join(value)[:80] or 'nothing'}"
        )
    text = _text(value[answer], f"{where}: {answer}")
    if isinstance(value[prompt], list):
        return {"messages": [*_messages(value[prompt], f"{where}: {prompt}"), {"role": "assistant", "content": text}]}
    asked = _text(value[prompt], f"{where}: {prompt}", empty=True)
    if prompt == "instruction" and value.get("input"):
        asked = f"{asked}\n\n{_text(value['input'], f'{where}: input')}\n\n"
    return {"prompt": asked, "answer": text}


def _ending(value, where: str) -> list[dict]:
    """The messages of a conversation whose last one is the assistant's."""
    messages = _messages(value, where)
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: expected an assistant's message at the end, got a {messages[-1]['role']}'s")
    return messages


def _preference(value: dict, where: str) -> dict:
    for name in SIDES:
        if name not in value:
            raise InputError(f"{where}: a pair without {name}: expected prompt, chosen and rejected")
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    if prompt is None and isinstance(chosen, str):
        raise InputError(f"{where}: a pair without prompt: expected prompt, chosen and rejected")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise InputError(f"{where}: chosen and rejected: expected two texts or two lists of messages")
    if isinstance(chosen, list):
        sides = [_ending(side, f"{where}: {name}") for name, side in zip(SIDES, (chosen, rejected), strict=True)]
        before = sides[0][:-1]
        if sides[1][:-1] != before:
            raise InputError(f"{where}: chosen and rejected: the messages before the last one differ")
        if isinstance(prompt, str) and not before:
            before = [{"role": "user", "content": _text(prompt, f"{where}: prompt")}]
        elif isinstance(prompt, list):
            given = _messages(prompt, f"{where}: prompt")
            before = before if before[: len(given)] == given else [*given, *before]
        prompt, (chosen, rejected) = before, (side[-1]["content"] for side in sides)
    elif isinstance(prompt, list):
        prompt = _messages(prompt, f"{where}: prompt")
    else:
        _text(prompt, f"{where}: prompt", empty=True)
    for name, side in zip(SIDES, (chosen, rejected), strict=True):
        _text(side, f"{where}: {name}")
    if chosen == rejected:
        raise InputError(f"{where}: chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _read(paths: Sequence[str | Path], make, what: str) -> list[dict]:
    examples = [make(value, where) for path in map(Path, paths) for where, value in _objects(path)]
    if not examples:
        raise InputError(f"{paths[0] if paths else 'data'}: no {what} in it")
    return examples


def read_instructions(paths: Sequence[str | Path]) -> list[dict]:
    """JSON lines of a prompt and its answer, or of messages with the roles system, user and assistant.

    The prompt is ``prompt``, ``instruction`` (with Alpaca's ``input``) or ``question``, a text or a list of messages;
    the answer is ``answer``, ``completion``, ``response`` or ``output``.

    Raises:
        InputError: a file is missing, empty or malformed, an answer is missing or empty, or a text has half a surrogate
            pair. Names the line.
    """
    return _read(paths, _instruction, "prompt with an answer")


def read_preferences(paths: Sequence[str | Path]) -> list[dict]:
    """JSON lines of prompt, chosen and rejected: texts, or messages whose last one is the answer.

    Raises:
        InputError: a file is missing, empty or malformed, a part is missing, an answer is empty, the two answers are
            the same or do not follow the same messages. Names the line.
    """
    return _read(paths, _preference, "pair of answers")


def prompt_form(path: str | Path) -> str | None:
    """What a file of JSON lines has by its first one, "dpo" or "instruct"; None for any other file."""
    path = Path(path)
    # A pipe can be read only once.
    if ".json" not in path.name.lower() or not path.is_file():
        return None
    try:
        first = next((line for line in lines_of(read_text(path)) if line.strip()), "")
        value = json.loads(first) if first.startswith("{") else None
    except (InputError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if "chosen" in value and "rejected" in value:
        return "dpo"
    asked = any(name in value for name in PROMPTS) and any(name in value for name in ANSWERS)
    return "instruct" if asked or "messages" in value else None


def rendered(example: dict, tokenizer: Tokenizer) -> dict:
    """An example as the readers give it, with its conversation as text: by the tokenizer's chat template if it has one.

    Raises:
        InputError: the template does not serve, or a message holds one of the tokenizer's special tokens.
    """
    templated = tokenizer.chat_template is not None
    if "messages" in example:
        return {"parts": answers_of(example["messages"], tokenizer), "templated": templated}
    if "answer" in example:
        return {"parts": [[example["prompt"], False], [example["answer"], True]], "templated": False}
    if isinstance(example["prompt"], str):
        return {**example, "templated": False}
    prompt, answers = prompt_of(example["prompt"], (example["chosen"], example["rejected"]), tokenizer)
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "templated": templated}
