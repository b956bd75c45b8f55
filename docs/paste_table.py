"""The substitutes of docs/paste.py: what is run in place of a command, and why; and the files that commands read."""

from __future__ import annotations

import gzip
import json
import pydoc
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import NamedTuple


class Rule(NamedTuple):
    pattern: str  # a regular expression, searched for in the command
    instead: str | None  # what the match becomes; None: the command is left out
    why: str
    page: str = ".*"  # of the page's path
    active_only: bool = False  # not in a fresh environment


# Variables of every command.
ENVIRONMENT = {"S": "sources", "MPLBACKEND": "Agg", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

# Programs of extras that the active environment need not have; a command of one that is not there is left out.
OPTIONAL = ("mkdocs",)

# Code in a sentence that names a command or shows half of one. It is not run.
MENTIONS = (
    r".*\b(NAME|FILE|PAGES|MODEL_FOLDER|RUN|FOLDER)\b.*",
    r".*\.\.\..*",
    r"fastllm (bench|train|info|serve|eval|answer|translate|prepare|tokenizer|generate|classify|report|plan|export)",
    r"fastllm (bench regress|tokenizer show|train --data|train --device mps|translate --beams 5 --file)",
    r"pip install (-e '?\.(\[[\w,]+\])?'?|torch|torch==[\d.]+|'sacrebleu\[ja\]')",
    r"FASTLLM_CUDA=1 pip install -e \.",
    r"python -m fastllm\.bench\.cleaning",
)

_FEW_STEPS = "training is held to a few steps"
_SHORT = "training is held to 8 s"
_BENCH = "timing is held to seconds"
_MINUTES = "takes minutes; FASTLLM_TESTS=thorough or .ci/run has it"
_ONE_OP = "one op, not all"
_RUNS = "bench/results"
_INSTALLED = "the active environment has it"

RULES = (
    # What a machine lacks.
    Rule(r"^sudo apt-get install -y python3\.11-doc && ", "", "no root is assumed"),
    Rule(r"/usr/share/doc/python3\.11/html/\{[^}]*\}", "pages notes", "pages of pydoc instead of Debian's"),
    Rule(r"srun ", None, "needs Slurm", "docs/training[.]md"),
    Rule(r"--tune$", None, "searches settings on a GPU"),
    Rule(r"^(bench/gpu\.sh results)$", r"FASTLLM_GPU_DRY_RUN=1 \1 800", "a dry run takes every path that needs no GPU"),
    Rule(r"--cpu \S+", "--cpu avx2", "not every CPU has the other levels"),
    Rule(r"--nproc-per-node 8", "--nproc-per-node 2", "two processes do for eight", "docs/training[.]md"),
    Rule(r"--tensor-parallel 4", "--tensor-parallel 2", "two processes do for eight", "docs/training[.]md"),
    Rule(r"^curl -LO \S+/tinyshakespeare/input\.txt$", None, "a made-up input.txt takes its place"),
    # The environment is the active one.
    Rule(r"^pip install [^&|]*&& (pip install [^&|]*&& )?", "", _INSTALLED, active_only=True),
    Rule(r"^pip install [^&|]*(&& pip install [^&|]*)?$", None, _INSTALLED, active_only=True),
    # Placeholders.
    Rule(r"SOURCE\.\.\.", "pages notes", "the sources are made up", "docs/data[.]md"),
    Rule(
        r"A\.json B\.json",
        "bench/results/cpu-avx2/bench.json bench/results/cpu-avx512/bench.json",
        "two committed runs",
    ),
    Rule(r" \.\.\. ", " --data corpus/ --batch-size 64 ", "the settings of the line before", "docs/training[.]md"),
    # Training.
    Rule(r"--max-seconds \d+", "--max-seconds 8", _SHORT),
    Rule(r"--steps \d{3}", "--steps 6", _FEW_STEPS),
    # README's own run is whole.
    Rule(
        r"\A(?![\s\S]*(?:--max-seconds|--steps|--help|--resume))([\s\S]*?fastllm train)",
        r"\1 --max-seconds 8",
        _SHORT,
        "docs/.*",
    ),
    Rule(r"--batch-size 64", "--batch-size 8", _FEW_STEPS, "docs/training[.]md"),
    Rule(
        r"--dtype bfloat16",
        "--dtype float32",
        "not every CPU multiplies bfloat16 in hardware",
        "docs/tour-measured[.]md",
    ),
    Rule(r"for seed in 0 1 2 3 4", "for seed in 0", "one seed, not five"),
    # Tests and measurements.
    Rule(r"pytest$", "pytest -n 0 tests/test_readme.py", "the whole suite takes ten minutes; .ci/run has it"),
    Rule(r"^FASTLLM_TESTS=thorough pytest|--prepare built$|bench\.attention_tables ", None, _MINUTES),
    Rule(r"-k rms_norm$", "-k 'rms_norm and float32'", "one dtype, not three"),
    Rule(r"pytest bench/ --benchmark-only", "pytest bench/ --benchmark-only --quick -k 'swiglu and eager'", _BENCH),
    Rule(
        r"^fastllm bench(( --cpu avx2)?( --sweep)?)( --budget \d+)?$", r"fastllm bench rms_norm\1 --budget 90", _BENCH
    ),
    Rule(r"--rival (\S+)( --shape \S+)?$", r"--rival \1 --shape GPT-2 --provider eager --budget 90", _BENCH),
    Rule(r"^fastllm bench train.*", "fastllm bench train --preset tiny --batch-size 2 --steps 1 --rounds 2", _BENCH),
    Rule(r"^fastllm bench --static$", None, "takes minutes; its parts run for one op from docs/static.md"),
    Rule(r"bench\.(model|static|other_gpus)$", r"bench.\1 swiglu", _ONE_OP),
    Rule(r"bench\.generation --tokens 24", "bench.generation --tokens 4 --rounds 1 --model gpt", _BENCH),
    Rule(r"bench\.memory --dtype bfloat16", "bench.memory --dtype float32 --tokens 512 --rounds 1", _BENCH),
    Rule(r"bench\.post_training --tokens 2048", "bench.post_training --tokens 128 --rounds 1", _BENCH),
    Rule(r"bench\.experts$", "bench.experts --dtype float32 --rounds 1", _BENCH),
    Rule(r"tests/transformers_checks\.py$", "tests/transformers_checks.py llama", "one architecture, not 18"),
    Rule(r"bench\.narrow_models( --size small medium)?", "bench.narrow_models --size small --rounds 1", _BENCH),
    Rule(r"bench\.other_gpus --gpu sm_90 --samples$", "bench.other_gpus swiglu --gpu sm_90 --samples", _ONE_OP),
    Rule(
        r"^python docs/static\.py( --oldest)?$", "python docs/static.py --check", "all kernels take minutes to compile"
    ),
)

# Page -> kinds of files that its commands read.
INPUTS = {
    "docs/benchmarks.md": ("rivals", "bench"),
    "docs/data.md": ("pages", "books"),
    "docs/post-training.md": ("books", "prompts", "runs/write"),
    "docs/regress.md": ("gate",),
    "docs/tour.md": ("books", "prompts", "sources", "blimp"),
    "docs/tour-measured.md": ("books", "prompts", "sources", "reviews", "multi30k"),
    "docs/train.md": ("books", "pages", "plays", "runs/other"),
    "docs/training.md": ("books",),
}
_RIVALS = """
import torch.nn.functional as F


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


fused = layer_norm
"""


def make_inputs(folder: Path, environment: dict[str, str], kinds: tuple[str, ...]) -> None:
    """Small made-up files of these kinds in ``folder``, which is a checkout of fastllm; runs of two steps."""
    for kind in kinds:
        if kind.startswith("runs/"):
            command = ["fastllm", "train", "--steps", "2", "--quiet", "--out", kind]
            subprocess.run(command, cwd=folder, env=environment, check=True)
        else:
            _MAKERS[kind](folder)


def _topics() -> list[str]:
    return list(import_module("pydoc_data.topics").topics.values())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, "utf-8")


def _lines(path: Path, rows: list[dict]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _books(folder: Path) -> None:
    """A long text, folders of short ones, and a held-out one."""
    topics = _topics()
    _write(folder / "book.txt", "\n\n".join(topics[:40]))
    _write(folder / "held-out.txt", "\n\n".join(topics[40:44]))
    for number, text in enumerate(topics[44:]):
        _write(folder / ("notes" if number % 2 else "corpus") / f"{number}.txt", text)


def _plays(folder: Path) -> None:
    """One text, as Tiny Shakespeare is."""
    _write(folder / "input.txt", "\n\n".join(_topics()))


def _pages(folder: Path) -> None:
    """Web pages of modules of Python's library."""
    for name in (
        "argparse",
        "csv",
        "json",
        "logging",
        "pathlib",
        "random",
        "shutil",
        "statistics",
        "string",
        "textwrap",
    ):
        page = pydoc.html.page(name, pydoc.html.document(import_module(name), name))
        _write(folder / "pages" / f"{name}.html", page)


def _sources(folder: Path) -> None:
    """Texts by part of a documentation, paragraphs with their part, and questions."""
    parts = ("c-api", "howto", "tutorial", "whatsnew", "library")
    topics = _topics()
    rows = []
    for number, part in enumerate(parts):
        _write(folder / "sources" / part / "a.txt", "\n\n".join(topics[number::5]))
        rows += [(" ".join(text.split())[:200].replace('"', "'"), part) for text in topics[number:60:5]]
    for name, some in (("sections.csv", rows[::2]), ("sections.held.csv", rows[1::2])):
        _write(folder / name, "text,label\n" + "".join(f'"{text}",{part}\n' for text, part in some))
    asked = []
    for number in range(40):
        answer = f"a value of kind {number}"
        context = f"A thing is here. item{number}: it is {answer}. Another thing is there."
        found = {"text": answer, "answer_start": context.index(answer)}
        question = {"id": str(number), "question": f"What is item{number}?", "answers": [found]}
        asked.append({"paragraphs": [{"context": context, "qas": [question]}]})
    _write(folder / "questions.json", json.dumps({"data": asked}))


def _prompts(folder: Path) -> None:
    preferences = [{"prompt": f"Is {n} a number?", "chosen": " Yes.", "rejected": " No."} for n in range(40)]
    _lines(folder / "instructions.jsonl", [{"prompt": row["prompt"], "answer": row["chosen"]} for row in preferences])
    _lines(folder / "preferences.jsonl", preferences)
    _lines(folder / "held-out-preferences.jsonl", preferences[:8])


def _reviews(folder: Path) -> None:
    """Labelled lines in the forms of the Stanford treebank and of TREC."""
    words = ("cold", "dull", "slow") * 4, ("warm", "clever", "funny") * 4
    reviews = [f"{label} a {word} film number {n} .\n" for label in (0, 1) for n, word in enumerate(words[label])]
    labelled = "".join(reviews)
    for name in ("stsa.binary.train", "stsa.binary.dev", "stsa.binary.test"):
        _write(folder / f"{name}.gz", labelled.replace("film", name.rpartition(".")[2]) * 3)
    phrases = labelled.replace("0 ", "negative\t").replace("1 ", "positive\t")
    _write(folder / "sst2.phrases.tsv.gz", "label\ttext\n" + phrases)
    kinds = "".join(f"{kind}:any What is number {n} ?\n" for n in range(20) for kind in ("NUM", "LOC", "HUM"))
    for name in ("TREC.train.all", "TREC.test.all"):
        _write(folder / f"{name}.gz", kinds)


def _multi30k(folder: Path) -> None:
    pairs = [(f"A man sees {n} dogs.", f"Ein Mann sieht {n} Hunde.") for n in range(200)]
    for name, some in (("train", pairs[:160]), ("val", pairs[160:180]), ("test_2016_flickr", pairs[180:])):
        for side, language in enumerate(("en", "de")):
            text = "".join(pair[side] + "\n" for pair in some)
            _write(folder / "multi30k" / f"{name}.{language}.gz", text)
    _write(folder / "pairs.tsv", "".join("\t".join(pair) + "\n" for pair in pairs[:60]))


def _blimp(folder: Path) -> None:
    field = {"field": "syntax", "linguistics_term": "agreement", "UID": "agreement", "simple_LM_method": True}
    rows = [
        {"sentence_good": f"The {n} cats sleep.", "sentence_bad": f"The {n} cats sleeps.", **field} for n in range(4)
    ]
    _lines(folder / "blimp" / "data" / "agreement.jsonl", [{**row, "pairID": str(n)} for n, row in enumerate(rows)])


def _copy(folder: Path, source: str, name: str) -> None:
    shutil.copy(folder / source, folder / name)


_MAKERS = {
    "books": _books,
    "pages": _pages,
    "plays": _plays,
    "sources": _sources,
    "prompts": _prompts,
    "reviews": _reviews,
    "multi30k": _multi30k,
    "blimp": _blimp,
    "rivals": lambda folder: _write(folder / "my_kernels.py", _RIVALS),
    "bench": lambda folder: _copy(folder, "bench/results/cpu-avx2/bench.json", "bench.json"),
    "gate": lambda folder: _copy(folder, "examples/regress/kernels.py", "gate.py"),
}
