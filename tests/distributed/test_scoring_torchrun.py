"""Distributed scoring in a real torchrun: both ends in the store that it made."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, time, torch, fastis
from fastis.scoring import Inbox, Scorer

torch.set_num_threads(1)
x, y = torch.arange(80.0).view(80, 1), torch.arange(80) % 4
model = torch.nn.Linear(1, 4)
if os.environ["RANK"] == "0":
    sampler = fastis.Sampler(80, 8, method="distributed", group=False, seed=0)
    with Inbox(sampler, "env://") as inbox:
        while sampler.stats()["share_unseen"] > 0 or inbox.stats()["scorers"] < 2:
            inbox.publish(model, 0)
            inbox.fold()
            time.sleep(0.01)
    print("all seen:", bool((sampler.last_seen == 0).all()))
else:
    score_fn = lambda i: fastis.cross_entropy(model(x[i]), y[i])
    sent = Scorer(model, score_fn, 80, store="env://", batch_size=16).run()
    print("sent some:", sent > 0)
"""


@pytest.mark.slow  # three interpreters start
def test_env_is_the_store_of_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all seen: True") == 1
    assert done.stdout.count("sent some: True") == 2
