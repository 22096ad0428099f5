"""A node that falls silent, as if its cable were drawn: no connection is closed."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from benchmarks.ray_nodes import three_nodes
from cluster.connection import reached
from cluster.nodes import alive_nodes, require_alike

pytest.importorskip("ray")


@pytest.mark.slow
def test_a_node_that_falls_silent_while_it_is_asked_is_passed_over(tmp_path: Path) -> None:
    with three_nodes() as nodes, reached(nodes.address):
        silence = threading.Timer(0.3, nodes.hang, [random.Random(0)])  # before it has a process
        silence.start()
        begun = time.monotonic()
        require_alike([], tmp_path)
        assert time.monotonic() - begun < 110  # Ray notices after 63 s, and may tell nobody
        silence.join()
        assert len(alive_nodes()) == 2
