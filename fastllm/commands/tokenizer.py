"""Train a tokenizer, look at what it does to a text, or encode a corpus into token files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..config import InputError, read_plain
from ..data import DataConfig, Tokenizer, load_corpus, prepare
from ..data.token_shards import SHARD_TOKENS
from ..data.tokenizer import KINDS, SPECIAL_TOKENS
from ..data.tokenizer_show import ShownPieces, ShownSample
from ..data.tokenizer_training import check_training
from ..files import folder_to_fill
from ..training.reports.progress import Display, printable

_SHADES = ("on #1f3a5f", "on #5f1f3a", "on #1f5f3a", "on #5f4a1f")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train one on a corpus", description="Train a tokenizer on a corpus.")
    _add_source(train)
    train.add_argument(
        "--out", required=True, metavar="FOLDER", help="where to write tokenizer.json and tokenizer_config.json"
    )
    train.add_argument("--kind", choices=KINDS, default="bpe", help="(default: %(default)s)")
    train.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="(default: %(default)s)")
    train.add_argument(
        "--objective", choices=tuple(SPECIAL_TOKENS), default="causal",
        help="which special tokens it gets (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--lowercase", action="store_true", help="wordpiece and word only")
    train.add_argument(
        "--sample-mb", type=int, default=512, metavar="N",
        help="train on about N megabytes of text, taken evenly from the corpus (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--quiet", action="store_true", help="print nothing but errors")

    show = actions.add_parser("show", help="the pieces of a text", description="Show the pieces of a text.")
    show.add_argument("text", nargs="?", metavar="TEXT", help="the text; without it and --file, standard input is read")
    show.add_argument("--file", metavar="FILE", help="a text file")
    _add_tokenizer(show)
    show.add_argument("--ids", action="store_true", help="print only the ids")

    encode = actions.add_parser("encode", help="write token files", description="Encode a corpus into token files.")
    _add_source(encode)
    _add_tokenizer(encode)
    encode.add_argument(
        "--out", required=True, metavar="FOLDER", help="where to write the token files, for fastllm train --data"
    )
    encode.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="tokens in one file (default: %(default)s)"
    )
    encode.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="what fastllm prepare wrote, or text files")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="a tokenizer.json, or a folder with one")


def _load(name: str) -> Tokenizer:
    path = Path(name)
    return Tokenizer.load(path / "tokenizer.json" if path.is_dir() else path)


def run(arguments: argparse.Namespace) -> int:
    return {"train": _train, "show": _show, "encode": _encode}[arguments.action](arguments)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.sample_mb < 1:
        raise InputError(f"--sample-mb: expected at least 1, got {arguments.sample_mb}")
    special = SPECIAL_TOKENS[arguments.objective]
    check_training(arguments.vocab_size, arguments.kind, special, arguments.lowercase)
    display = Display(arguments.quiet)
    with folder_to_fill(arguments.out) as out:
        corpus = load_corpus(DataConfig(data=tuple(arguments.source), deduplicate=False))
        documents = ShownSample(corpus, arguments.sample_mb << 20)
        display.say(documents.note)
        tokenizer = Tokenizer.train(
            documents, arguments.vocab_size, arguments.kind, special_tokens=special, lowercase=arguments.lowercase
        )
        tokenizer.save_pretrained(out)
    display.say(f"{tokenizer.vocab_size:,} tokens in {Path(arguments.out) / 'tokenizer.json'}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    if arguments.text is not None and arguments.file is not None:
        raise InputError("--file: give it or a text, not both")
    tokenizer = _load(arguments.tokenizer)
    if arguments.text is not None:
        text = arguments.text
    else:
        try:
            text = (sys.stdin.buffer.read() if arguments.file is None else read_plain(arguments.file)).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{arguments.file or 'input'}: not UTF-8 text (offset {error.start})") from error
    pieces = ShownPieces(tokenizer, text)
    if arguments.ids:
        print(*pieces.ids)
        return 0
    console = Console(highlight=False, soft_wrap=True)
    line = Text()
    for i, piece in enumerate(pieces.strings):
        # Without colours a bar has to show where a piece ends.
        line.append(printable(piece) + ("" if console.is_terminal else "|"), _SHADES[i % len(_SHADES)])
    console.print(line)
    console.print(f"\n{len(pieces.ids):,} tokens, {pieces.bytes_per_token:.2f} bytes per token")
    for label, some in (("rarest here", pieces.rarest()), ("longest in the vocabulary", pieces.longest())):
        console.print(f"{label}: " + "  ".join(printable(repr(piece)) + note for piece, note in some), markup=False)
    return 0


def _encode(arguments: argparse.Namespace) -> int:
    if arguments.shard_tokens < 1:
        raise InputError(f"--shard-tokens: expected at least 1, got {arguments.shard_tokens}")
    display = Display(arguments.quiet)
    tokenizer = _load(arguments.tokenizer)
    with folder_to_fill(arguments.out) as out:
        corpus = load_corpus(DataConfig(data=tuple(arguments.source)))
        dataset = prepare(corpus, out, tokenizer=tokenizer, shard_tokens=arguments.shard_tokens)
    display.say(dataset.describe())
    return 0
