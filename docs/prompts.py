"""Text, instructions and preferences for docs/tour-measured.md, of the docstrings of Python's own library.

python docs/prompts.py FOLDER    text/ and held/ (a file for each module), instructions and preferences of both

The instructions and preferences are synthetic, made by a rule from sentences that follow each other. The prompt is a
sentence of a paragraph, the answer is the one that follows it. The rejected answer is the same with one of its inner
words left out. One module in ten is held out.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path

from fastllm.data.held_out import is_held_out
from fastllm.data.sentences import sentence_starts

# Folders of the library that are no library, or have the same text again.
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"}


def docstrings(library: Path) -> dict[str, str]:
    """Module -> its docstrings of more than 80 characters, for those with at least 500 in all."""
    found = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(one for one in texts if one and len(one) > 80)
        if len(text) >= 500:
            found[".".join(parts)] = text
    return found


def followers(documents: list[str]) -> list[tuple[str, str]]:
    """(sentence, the next one) of paragraphs, each pair once; sentences of 30 to 160 characters."""
    pairs = []
    for paragraph in (part for document in documents for part in document.split("\n\n")):
        text = " ".join(paragraph.split())
        starts = [*sentence_starts(text), len(text)]
        some = [text[a:b].strip() for a, b in pairwise(starts)]
        plain = [30 <= len(one) <= 160 and one[0].isupper() and one[-1] == "." for one in some]
        pairs += [(some[i], some[i + 1]) for i in range(len(some) - 1) if plain[i] and plain[i + 1]]
    return list(dict.fromkeys(pairs))


def examples(documents: list[str], seed: int = 0) -> dict[str, list[dict]]:
    """``instructions`` and ``preferences`` of ``documents``."""
    draw = random.Random(seed)
    made: dict[str, list[dict]] = {"instructions": [], "preferences": []}
    for prompt, answer in followers(documents):
        made["instructions"].append({"prompt": f"What follows: {prompt}\nAnswer: ", "answer": answer})
        words = answer.split(" ")
        if len(words) > 2:
            del words[draw.randrange(1, len(words) - 1)]
            made["preferences"].append({"prompt": f"{prompt} ", "chosen": answer, "rejected": " ".join(words)})
    return made


def main(folder: Path) -> None:
    modules = docstrings(Path(sysconfig.get_path("stdlib")))
    for part, held in (("text", False), ("held", True)):
        some = {name: text for i, (name, text) in enumerate(modules.items()) if is_held_out(i) == held}
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name, text in some.items():
            (folder / part / f"{name}.txt").write_text(text + "\n", "utf-8")
        for name, lines in examples(list(some.values())).items():
            path = folder / f"{name}{'.held' if held else ''}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
            print(f"{path}: {len(lines):,} examples from {len(some)} modules")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
