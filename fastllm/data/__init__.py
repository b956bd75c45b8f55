"""Corpus, tokenizer, token files, batches."""

from .batches import Batches, derive_seed, evaluation_batches, evaluation_windows
from .corpus import Corpus, default_corpus, read_corpus, xz_bits_per_byte
from .dataset import DataConfig, Dataset, load_corpus, load_dataset, open_dataset, prepare
from .token_file import TokenFile, open_token_file, write_token_file
from .tokenizer import Tokenizer

__all__ = [
    "Batches",
    "Corpus",
    "DataConfig",
    "Dataset",
    "TokenFile",
    "Tokenizer",
    "default_corpus",
    "derive_seed",
    "evaluation_batches",
    "evaluation_windows",
    "load_corpus",
    "load_dataset",
    "open_dataset",
    "open_token_file",
    "prepare",
    "read_corpus",
    "write_token_file",
    "xz_bits_per_byte",
]
