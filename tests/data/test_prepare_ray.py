"""fastllm prepare on a Ray cluster of two nodes, one of which is killed in the middle of the run.

Takes minutes: FASTLLM_TESTS=thorough runs it.
"""

import json
import threading
import time

import pytest
from extras import needed
from pages import article, page
from thorough import THOROUGH

from fastllm.data.clean import CleanConfig
from fastllm.data.pipeline import PipelineConfig, prepare_text, work

needed("ftfy", "data")
pytestmark = THOROUGH


@pytest.mark.filterwarnings("ignore")
def test_the_output_is_the_single_machines_although_a_node_died(tmp_path, monkeypatch):
    lacking = "ray is not installed: it is no part of the ci extra"
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason=lacking)
    import ray

    monkeypatch.setattr(work, "BATCH_BYTES", 1 << 16)
    folder = tmp_path / "sources"
    folder.mkdir()
    for i in range(1200):
        (folder / f"{i:04d}.html").write_text(page(article(i, 8)))
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": article(i % 500, 8)}) + "\n" for i in range(900)))
    config = PipelineConfig(shard_mb=1)
    prepare_text([folder], tmp_path / "single", CleanConfig(), config, workers=0)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    told = []
    killed = threading.Event()

    def tell(done, text):
        told.append(done)
        if len(told) == 5:
            cluster.remove_node(nodes[1], allow_graceful=False)
            killed.set()

    try:
        begin = time.monotonic()
        prepare_text([folder], tmp_path / "ray", CleanConfig(), config, engine="ray", tell=tell)
        assert killed.is_set()
        assert len(told) > 10
        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        assert len(alive) == 1
        print(f"{time.monotonic() - begin:.0f} s, killed after batch 5 of {len(told)}")
    finally:
        ray.shutdown()
        cluster.shutdown()

    def tree(root):
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    assert tree(tmp_path / "ray") == tree(tmp_path / "single")
