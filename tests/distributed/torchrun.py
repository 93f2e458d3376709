"""Scripts in processes that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastis

ROOT = Path(fastis.__file__).parents[1]


def torchrun(script: Path, *arguments: object, size: int = 2, restarts: int = 0) -> str:
    """What it prints; raises when it fails."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(size), "--max-restarts", str(restarts)),
        *("--monitor-interval", "0.1", str(script), *map(str, arguments)),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        # Else processes that were started again find the addresses of those before them in the
        # store, and gloo connects to these (pytorch issues 135712 and 167288).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout
