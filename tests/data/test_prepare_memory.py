"""The memory of fastllm prepare does not grow with its input: 2 GB of it, or FASTLLM_MEMORY_MB.

Takes minutes: FASTLLM_TESTS=thorough runs it.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from extras import needed
from pages import TOPICS, paragraph
from thorough import THOROUGH

needed("ftfy", "data")
pytestmark = [
    THOROUGH,
    pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc"),
]


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(grandchild for child in children for grandchild in _family(int(child)))]


def _resident(pid: int) -> int:
    """MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS")), 0)


def test_memory_stays_as_it_is(tmp_path):
    draw = random.Random(0)
    pool = [paragraph(TOPICS[i % 20], draw) for i in range(4000)]
    size, limit = 0, int(os.environ.get("FASTLLM_MEMORY_MB", "2000")) * 10**6
    with open(tmp_path / "input.jsonl", "w") as file:
        while size < limit:
            size += file.write(json.dumps({"text": "\n\n".join(draw.choices(pool, k=80))}) + "\n")
    command = ["prepare", str(tmp_path / "input.jsonl"), "--out", str(tmp_path / "out"), "--workers", "2", "--quiet"]
    # What a document passes through is measured as fast as it goes: rules and comparing hold on to no text.
    command += ["--rules", "none", "--no-near-duplicates", "--shard-mb", "8"]
    process = subprocess.Popen([sys.executable, "-m", "fastllm", *command])
    samples = []
    while process.poll() is None:
        time.sleep(0.2)
        try:
            samples.append([_resident(pid) for pid in _family(process.pid)])
        except (FileNotFoundError, ProcessLookupError):
            continue
        # Shards that are done: the first ones have filled every buffer.
        samples[-1].append(len(list((tmp_path / "out" / "work").glob("done-*.json"))))
    assert process.returncode == 0
    done = max(sample[-1] for sample in samples)
    assert done > 5
    for i in range(10):
        part = [sum(s[:-1]) for s in samples[i * len(samples) // 10 : (i + 1) * len(samples) // 10]]
        print(f"{i * 10:3d}% of the time: {min(part)} to {max(part)} MiB")
    early = max(sum(s[:-1]) for s in samples if 2 <= s[-1] <= done // 2)
    late = max(sum(s[:-1]) for s in samples if s[-1] > done // 2)
    print(f"{size / 1e6:.0f} MB in: {early} MiB at most in the first half, {late} MiB in the second")
    assert late < 1.1 * early
