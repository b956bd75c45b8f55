"""Several token files that follow each other, written shard by shard and read as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .concatenated import Concatenated
from .digest import arrays_sha256
from .token_file import TokenFile, TokenWriter, encoded, open_token_file
from .tokenizer import Tokenizer

# Ids in one shard: 512 MiB of uint16.
SHARD_TOKENS = 1 << 28


def write_token_shards(
    folder: Path, name: str, documents: Iterable[str], tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS
) -> tuple[list[str], str]:
    """Encode ``documents`` into ``folder``/``name``-00000.bin and so on; no document lies in two.

    A shard ends with the document that reaches ``shard_tokens``. Files that an earlier writing left are removed.

    Returns:
        The files' names, and the SHA-256 of all ids.
    """
    rest = iter(encoded(documents, tokenizer))
    names: list[str] = []
    following = next(rest, None)
    while following is not None or not names:
        names.append(f"{name}-{len(names):05d}.bin")
        with TokenWriter(folder / names[-1], tokenizer, shard=len(names) - 1) as writer:
            while following is not None:
                writer.add(*following)
                following = next(rest, None)
                if writer.tokens >= shard_tokens:
                    break
    for old in folder.glob(f"{name}-*.bin"):
        if old.name not in names:
            old.unlink()
    written = (open_token_file(folder / file, tokenizer, number).tokens for number, file in enumerate(names))
    return names, arrays_sha256(written)


def open_token_shards(
    folder: Path, names: Sequence[str], tokenizer: Tokenizer | None = None, sha256: str | None = None
) -> TokenFile:
    """Open and check what :func:`write_token_shards` wrote, as one.

    Args:
        sha256: of all ids, for several shards; each shard is checked by its own.

    Raises:
        InputError: as :func:`open_token_file`.
    """
    files = [open_token_file(folder / name, tokenizer, number) for number, name in enumerate(names)]
    if len(files) == 1:
        return files[0]
    begins = np.cumsum([0, *(len(file) for file in files[:-1])]).tolist()
    return TokenFile(
        path=files[0].path,
        tokens=Concatenated([file.tokens for file in files]),
        vocab_size=files[0].vocab_size,
        documents=sum(file.documents for file in files),
        bytes=sum(file.bytes for file in files),
        tokenizer=files[0].tokenizer,
        sha256=sha256 or "",
        document_starts=Concatenated([file.document_starts for file in files], begins),
        sentence_starts=Concatenated([file.sentence_starts for file in files], begins),
    )
