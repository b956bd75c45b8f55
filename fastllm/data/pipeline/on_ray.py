"""The same work on a Ray cluster, through Ray Data: batches out, results back in the batches' order.

Each file that is one document is read by the task that cleans it, so all machines must see the sources under the same
paths; archives are read by the driver, which also writes. A task whose worker dies is run again elsewhere.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

from ..clean import CleanConfig
from ..optional import require
from .config import PipelineConfig
from .work import Batch, BatchResult, run_batch

# Batches that one Ray Data execution takes: what bounds the driver's memory. A guess.
WINDOW = 64


def _task(row: dict[str, Any], cleaning: CleanConfig, config: PipelineConfig) -> dict[str, Any]:
    return {"number": row["number"], "result": pickle.dumps(run_batch(pickle.loads(row["items"]), cleaning, config))}


def results(
    batches: Iterable[Batch], cleaning: CleanConfig, config: PipelineConfig
) -> Iterator[tuple[Batch, BatchResult]]:
    """Each batch with its result, in order.

    Raises:
        InputError: ray is not installed.
    """
    ray = require("ray", "ray", "--engine ray", extra="ray")
    data = require("ray.data", "ray[data]", "--engine ray", extra="ray")
    started = not ray.is_initialized()
    if started:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="ERROR")
    data.DataContext.get_current().execution_options.preserve_order = True
    data.DataContext.get_current().enable_progress_bars = False
    source = iter(batches)
    try:
        while window := [batch for _, batch in zip(range(WINDOW), source, strict=False)]:
            rows = [{"number": i, "items": pickle.dumps(batch.items)} for i, batch in enumerate(window)]
            dataset = data.from_items(rows, override_num_blocks=len(rows)).map(
                _task, fn_kwargs={"cleaning": cleaning, "config": config}
            )
            count = 0
            for row in dataset.iter_rows():
                # A wrong order would be a wrong corpus: better none.
                if row["number"] != count:
                    raise RuntimeError(f"Ray gave batch {row['number']} where batch {count} was due")
                yield window[count], pickle.loads(row["result"])
                count += 1
            if count != len(window):
                raise RuntimeError(f"Ray gave {count} of {len(window)} batches")
    finally:
        if started:
            ray.shutdown()
