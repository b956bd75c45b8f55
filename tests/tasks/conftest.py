"""What the tests of tasks share."""

import pytest
from task_text import TEXT

from fastllm.data import Tokenizer
from fastllm.data.tokenizer import SPECIAL_TOKENS


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([TEXT], 300, special_tokens=SPECIAL_TOKENS["masked"])
