"""Readers of what others may have written: any bytes at all give the library's own error or a result, never a crash.

``FASTLLM_TESTS=thorough pytest -n 0 tests/data/test_fuzz.py`` gives each 13,000 inputs, not 60 or 500, 182,000 in all
(minutes).
"""

import io
import json
import random
import shutil
import struct
import tarfile
import zipfile

import pytest
from extras import needed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages import dump, warc
from prose import prose
from thorough import IS_THOROUGH
from toy import TOY

from fastllm.config import InputError
from fastllm.data import Tokenizer
from fastllm.data.sources import Failure, Limits, Raw, SourceEntry, read
from fastllm.data.sources.plan import format_of
from fastllm.data.token_file import open_token_file
from fastllm.files import read_tensors
from fastllm.models import Transformer
from fastllm.training.checkpoints.checkpoint import (
    check,
    find_checkpoint,
    load_config,
    read_state,
    save_model,
    write_manifest,
)
from fastllm.training.config import read_run_config
from fastllm.training.reports.progress import read_metrics

EXAMPLES = 13_000 if IS_THOROUGH else 60
many = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=not IS_THOROUGH,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A valid file of each kind, to be changed."""
    folder = tmp_path_factory.mktemp("seeds")
    tokenizer = Tokenizer.train([prose(60)], 300)
    save_model(folder, Transformer(TOY), tokenizer)
    state = {"step": 3, "seconds": 1.5, "tokens": 9, "dtype": "float32", "data": "ab", "settings": {"lr": 1.0}}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").write_text("{}")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    (folder / "config.toml").write_text('[data]\ndata = ["a.txt"]\n[model]\nvocab_size = 300\n[training]\nlr = 0.1\n')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n')
    from fastllm.data.token_file import TokenWriter, encoded

    with TokenWriter(folder / "tokens.bin", tokenizer) as writer:
        for document in encoded([prose(3)], tokenizer):
            writer.add(*document)
    return folder


PIECES = [b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b"99999999999999999999", b"\xff\xfe", b"\x00" * 9, b'"']
VALUES = [None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "../../x"]
VALUES += ["\x00", "\ud800", "/etc/passwd", [], [1], ["a", None], {}, {"a": 1}, {"bytes": -1, "sha256": 3}]


def changed(draw: random.Random, content: bytes) -> bytes:
    """``content`` with pieces overwritten, cut out, put in, or with a JSON value replaced; or any bytes at all."""
    how = draw.randrange(6)
    if how == 0:
        return draw.randbytes(draw.randrange(300))
    if how <= 2:
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        if isinstance(value, dict) and value:
            inner = value
            while draw.random() < 0.4:
                nested = [child for child in inner.values() if isinstance(child, dict) and child]
                if not nested:
                    break
                inner = draw.choice(nested)
            key = draw.choice([*inner, "", "x", "../x"])
            if draw.random() < 0.2:
                inner.pop(key, None)
            else:
                inner[key] = draw.choice(VALUES)
            return json.dumps(value).encode("utf-8", "surrogatepass")
    result = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        # The beginning has the headers.
        start = draw.randrange(min(len(result), 400) + 1 if draw.random() < 0.7 else len(result) + 1)
        number = draw.choice([draw.getrandbits(64), draw.randrange(1000), 2**63, len(result)])
        piece = draw.choice([draw.randbytes(draw.randrange(12)), struct.pack("<Q", number), draw.choice(PIECES)])
        length = draw.choice([0, len(piece), len(piece), 1, 8, len(result)])
        result[start : start + length] = piece
    return bytes(result)


def reads(path, read):
    """What reading ``path`` gave; nothing but InputError may be raised."""
    try:
        return read(path)
    except InputError as error:
        return error


READERS = {
    "tokens.bin": open_token_file,
    "tokenizer.json": Tokenizer.load,
    "model.safetensors": read_tensors,
    "state.json": lambda path: read_state(path.parent),
    "config.json": lambda path: load_config(path.parent),
    "manifest.json": lambda path: check(path.parent),
    "config.toml": read_run_config,
    "metrics.jsonl": read_metrics,
}


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused(seeds, tmp_path, name):
    shutil.copytree(seeds, tmp_path / "copy")
    path, content = tmp_path / "copy" / name, (seeds / name).read_bytes()

    def fuzz(seed: int) -> None:
        path.write_bytes(changed(random.Random(seed), content))
        reads(path, READERS[name])

    if EXAMPLES > 1000:
        for seed in range(EXAMPLES):
            fuzz(seed)
    else:
        many(given(st.integers(0, 2**64))(fuzz))()


def archived(kind: str) -> bytes:
    """An archive of two small members: ``tar`` or ``zip``."""
    target = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", "one")
            archive.writestr("b.html", "<p>two")
    else:
        with tarfile.open(fileobj=target, mode="w") as archive:
            for name in ("a.txt", "b.html"):
                member = tarfile.TarInfo(name)
                member.size = 3
                archive.addfile(member, io.BytesIO(b"one"))
    return target.getvalue()


def table() -> bytes:
    """A Parquet file with a column of lists, whose footer has the most kinds of numbers."""
    arrow, parquet = needed("pyarrow", "parquet"), needed("pyarrow.parquet", "parquet")
    target = io.BytesIO()
    parquet.write_table(arrow.table({"text": ["one", "two"], "parts": [[1], []]}), target, store_schema=False)
    return target.getvalue()


SOURCES = {
    "a.warc": lambda: warc([b"<p>one", b"<p>two"], compress=False),
    "a.warc.gz": lambda: warc([b"<p>one", b"<p>two"]),
    "a.xml": lambda: dump([("One", "0", "text"), ("Two", "0", "#REDIRECT")]).encode(),
    "a.jsonl": lambda: b'{"text": "one", "url": "u"}\n{"text": "two"}\n',
    "a.tar": lambda: archived("tar"),
    "a.zip": lambda: archived("zip"),
    "a.parquet": table,
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.filterwarnings("ignore")
def test_documents_of_any_bytes_are_read_or_counted(tmp_path, name):
    if "warc" in name:
        needed("warcio", "data")
    content, limits = SOURCES[name](), Limits(document=1 << 16, ratio=50, free=1 << 18)
    for seed in range(max(EXAMPLES, 500)):
        found = changed(random.Random(seed), content)
        (tmp_path / name).write_bytes(found)
        entry = SourceEntry(str(tmp_path / name), name, format_of(name) or "", len(found))
        assert all(isinstance(item, (Raw, Failure)) for item in read(entry, limits)), seed


def test_any_names_in_a_folder_of_checkpoints_are_read_or_refused(tmp_path):
    @settings(many, max_examples=min(EXAMPLES, 500))
    @given(st.lists(st.text("step-0123456789.tmp/\x00ä", min_size=1, max_size=24), max_size=4), st.binary(max_size=40))
    def fuzz(names, latest):
        folder = tmp_path / "run" / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in names:
            if "/" not in name and "\x00" not in name and name not in (".", ".."):
                (folder / name).mkdir(exist_ok=True)
        (folder / "latest").write_bytes(latest)
        reads(tmp_path / "run", find_checkpoint)

    fuzz()
