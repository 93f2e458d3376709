"""Where and when a measurement was made; every result row carries it."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

import fastis


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(device: torch.device) -> dict[str, object]:
    """Date, machine and versions as plain JSON values."""
    machine = {
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": {
            "fastis": fastis.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


def provenance_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """Machines, versions and dates of the rows."""

    def machine(row: Mapping[str, Any]) -> str:
        where = row["machine"]
        parts = [where["gpu"]] if "gpu" in where else []
        cpu = f"{where['cpu']} ({where['isa']})" if "isa" in where else where["cpu"]
        parts += [cpu, f"{where['threads']} thread(s) a run"]
        parts += [f"{row['jobs']} run(s) at a time"] if "jobs" in row else []
        return ", ".join(parts)

    def distinct(of: Callable[[Mapping[str, Any]], str]) -> str:
        return "; ".join(dict.fromkeys(map(of, rows)))

    versions = distinct(lambda row: ", ".join(f"{k} {v}" for k, v in row["versions"].items()))
    days = sorted({row["date"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Measured {when} on {distinct(machine)}; {versions}."
