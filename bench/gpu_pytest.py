"""A plugin for pytest on a GPU: after an error of the device the process ends at once.

Nothing can be launched in it any more, and every later test would fail with the same message.
pytest-xdist names the test that it was, starts another process, and goes on with the next.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{item.nodeid}: {error}", flush=True)
        os._exit(70)
