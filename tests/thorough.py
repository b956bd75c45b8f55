"""What takes longer than a test of every change should: ``FASTLLM_TESTS=thorough pytest``."""

import os

import pytest

_profile = os.environ.get("FASTLLM_TESTS", "")
if _profile not in ("", "thorough"):
    raise pytest.UsageError(f"FASTLLM_TESTS={_profile}: expected nothing, or thorough")
IS_THOROUGH = _profile == "thorough"
THOROUGH = pytest.mark.skipif(not IS_THOROUGH, reason="FASTLLM_TESTS=thorough runs it")
