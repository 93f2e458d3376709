"""Runs training configurations, in this process or in several, and hands their rows back."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache

import torch
from tqdm import tqdm

from bench.experiments import loop
from bench.experiments.config import RunConfig
from bench.experiments.datasets import Dataset
from bench.experiments.tasks import load_task_data

# Says what to run next, best first; asked again after every run, since rows may call for others.
Plan = Callable[[], list[RunConfig]]


@cache
def cached_dataset(name: str, data: str | None) -> Dataset:
    """Loaded once a process."""
    return load_task_data(name, data)


def start_worker(lock: object, lines: multiprocessing.Queue) -> None:
    """Gives this process a line for its progress bar, and ends it when its parent is killed."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    tqdm.set_lock(lock)
    run_here.line = lines.get()


def _exit_with_parent() -> None:
    """A worker whose parent is gone would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_here(config: RunConfig, data: str | None, threads: int) -> dict:
    """One run in this process."""
    torch.set_num_threads(threads)
    line = getattr(run_here, "line", 0)
    return loop.run(config, cached_dataset(config.dataset, data), position=line, leave=line == 0)


def one_line(row: dict) -> str:
    final, label = row["final"], RunConfig(**row["config"]).label
    return (
        f"{label}: test error {final['test_error']:.2f} %, {final['ms_per_step']:.3f} ms/step"
        if final["test_error"] is not None
        else f"{label}: diverged"
    )


def run_all(plan: Plan, data: str | None, jobs: int = 1, threads: int = 1) -> Iterator[dict]:
    """The result rows as they get done; the caller stores each before it asks for the next.

    Parameters
    ----------
    plan : callable
        the runs still wanted; may go on naming those under way.
    data : str, optional
        the file that the data come from.
    jobs : int
        processes; with 1 everything happens in this one.
    threads : int
        of torch in each process.

    Raises
    ------
    RuntimeError
        after everything else is done, naming the runs that failed.
    """
    failed: dict[str, str] = {}
    yield from (_run_here if jobs <= 1 else _run_elsewhere)(plan, data, jobs, threads, failed)
    if failed:
        raise RuntimeError("\n".join([f"{len(failed)} runs failed", *failed.values()]))


def _note_failure(failed: dict[str, str], config: RunConfig, error: BaseException) -> None:
    failed[config.key] = f"{config.label}: {type(error).__name__}: {error}"
    tqdm.write(failed[config.key])


def _run_here(
    plan: Plan, data: str | None, jobs: int, threads: int, failed: dict[str, str]
) -> Iterator[dict]:
    while pending := [c for c in plan() if c.key not in failed]:
        try:
            row = run_here(pending[0], data, threads)
        except Exception as error:  # a run may fail in any way; the others go on
            _note_failure(failed, pending[0], error)
            continue
        yield {**row, "jobs": 1}


def _run_elsewhere(
    plan: Plan, data: str | None, jobs: int, threads: int, failed: dict[str, str]
) -> Iterator[dict]:
    # spawn: CUDA and OpenMP do not survive a fork.
    context = multiprocessing.get_context("spawn")
    lines = context.Queue()
    for line in range(1, jobs + 1):
        lines.put(line)
    tqdm.set_lock(context.RLock())
    pool = ProcessPoolExecutor(jobs, context, start_worker, (tqdm.get_lock(), lines))
    running: dict[Future, RunConfig] = {}
    with pool, tqdm(desc="runs", unit="run") as bar:
        while True:
            taken = {config.key for config in running.values()} | failed.keys()
            pending = [config for config in plan() if config.key not in taken]
            bar.total = bar.n + len(running) + len(pending)
            for config in pending[: jobs - len(running)]:
                running[pool.submit(run_here, config, data, threads)] = config
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                config = running.pop(future)
                if error := future.exception():
                    _note_failure(failed, config, error)
                    continue
                row = {**future.result(), "jobs": jobs}
                tqdm.write(one_line(row))
                bar.update()
                yield row
