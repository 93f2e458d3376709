"""The four calls of bench/gpu_check.sh: each a list of steps, run one after the other.

A step is a process (a session of processes, which ends with it) with a time limit. After each
``$OUT/CALL.json`` is written anew: the steps with their outcomes, and every row that they stored. A
crash or a hang loses that step alone. Output goes to ``$OUT/CALL.log``. Imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CARRY = ROOT / "carry"
MINUTES = {"check": 4.0, "bench": 6.0, "sanitize": 5.0, "full": 9.0}
BIG, MIDDLE = "8192x128256xbfloat16", "32768x1000xbfloat16"
TABLE_TESTS = ("tests/test_cuda.py", "tests/test_cuda_renewal.py")
TESTS = (*TABLE_TESTS, "tests/test_cuda_loss.py")
# Counters that decide between launch geometries: bytes from memory, instructions issued, hits.
NCU_METRICS = (
    "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,"
    "sm__inst_issued.avg.pct_of_peak_sustained_active,lts__t_sector_hit_rate.pct,"
    "launch__registers_per_thread,launch__occupancy_limit_registers"
)


class Step(NamedTuple):
    """A command with its limit in seconds; without a GPU ``rehearsal`` runs instead."""

    name: str
    command: list[str]
    limit: float
    rehearsal: list[str]
    environment: tuple[tuple[str, str], ...] = ()


class Call:
    """One of the four calls: runs steps within its minutes, and keeps what they found."""

    def __init__(self, name: str, out: Path, dry: bool) -> None:
        self.name, self.out, self.dry = name, out, dry
        self.end = time.monotonic() + 60 * MINUTES[name]
        self.steps: list[dict[str, Any]] = []
        self.compiled = 0  # kernels of Triton that are there when it begins
        self.rows = Path(os.environ.get("TMPDIR", "/tmp")) / f"fastis-{name}-{os.getpid()}.jsonl"
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.log").write_text("")

    def run(self, step: Step) -> int:
        """The step's exit status; 124 when it ran out of time."""
        command = step.rehearsal if self.dry else step.command
        left = min(step.limit, self.end - time.monotonic())
        start, code = time.monotonic(), 124
        self.say(f"== {step.name} (at most {left:.0f} s): {' '.join(command)}")
        if left > 3 and command:
            code = self._spawn(command, left, {**self.environment, **dict(step.environment)})
        elif not command:
            code = 0
        outcome = {0: "passed", 124: "out of time"}.get(code, f"FAILED ({code})")
        if not command:
            outcome = "not rehearsed"
        seconds = round(time.monotonic() - start, 1)
        self.steps.append({"step": step.name, "outcome": outcome, "seconds": seconds})
        self.say(f"-- {step.name}: {outcome} after {seconds} s")
        self.write()
        return code

    def _spawn(self, command: list[str], left: float, environment: dict[str, str]) -> int:
        log = self.out / f"{self.name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                code = 124
            with contextlib.suppress(ProcessLookupError):  # what it left running, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return code

    def say(self, line: str) -> None:
        print(line, flush=True)
        with (self.out / f"{self.name}.log").open("a") as file:
            file.write(line + "\n")

    def write(self) -> None:
        rows = []
        if self.rows.exists():
            for line in self.rows.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last of a process killed
                    rows.append(json.loads(line))
        found = {"call": self.name, "dry_run": self.dry, "steps": self.steps, "rows": rows}
        beside = self.out / f"{self.name}.json.new"
        beside.write_text(json.dumps(found, indent=1) + "\n")
        beside.replace(self.out / f"{self.name}.json")

    def finish(self) -> int:
        self.write()
        self.rows.unlink(missing_ok=True)
        self.say("")
        for step in self.steps:
            self.say(f"{step['step']:32s} {step['seconds']:7.1f} s  {step['outcome']}")
        bad = [s for s in self.steps if s["outcome"] not in ("passed", "not rehearsed")]
        return 1 if bad else 0


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def rehearsed(*arguments: str) -> list[str]:
    """A script of bench/ against a GPU that isn't there."""
    return python("bench/gpu_rehearsal.py", *arguments)


def script(call: Call, name: str, limit: float, *arguments: str, small: Iterable[str] = ()) -> Step:
    """A benchmark that stores rows; ``small`` are its further arguments in a rehearsal."""
    path, *rest = arguments
    rows = ["--json", str(call.rows)]
    command = python(f"bench/{path}", *rest, *rows)
    return Step(name, command, limit, rehearsed(f"bench/{path}", *rest, *rows, *small))


# What every call begins with ----------------------------------------------------------------------


def digest() -> str:
    """Of what the extension is built from."""
    sources = [ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def unpack(call: Call) -> None:
    """The carried extension into the package, the carried kernels into a cache of their own."""
    if call.dry:
        return
    suffix = f"cpython-{sys.version_info[0]}{sys.version_info[1]}-*.so"
    made_of = CARRY / "sources"
    fresh = made_of.exists() and made_of.read_text().strip() == digest()
    if not fresh:
        call.say(f"{CARRY.name}/ has no extension of these sources: it is built here")
    for path in (CARRY / "lib" / "fastis").glob(f"_C.{suffix}") if fresh else ():
        shutil.copy2(path, ROOT / "fastis" / path.name)
        call.say(f"the extension of {CARRY.name}/ serves: {path.name}")
    if (CARRY / "triton").is_dir():
        cache = Path(os.environ.get("TMPDIR", "/tmp")) / "fastis-triton"
        relocate(CARRY / "triton", cache, (CARRY / "made_in").read_text().strip())
        call.environment["TRITON_CACHE_DIR"] = str(cache)


def relocate(carried: Path, cache: Path, made_in: str) -> None:
    """Copies Triton's cache; its index files name the others by their whole path."""
    shutil.copytree(carried, cache, dirs_exist_ok=True)
    before, after = f"{made_in}/carry/triton/", f"{cache}/"
    for index in cache.rglob("__grp__*.json"):
        index.write_text(index.read_text().replace(before, after))


def start(call: Call) -> bool:
    """A fastis that is built and sees the GPU."""
    unpack(call)
    call.compiled = cached_kernels(call)
    show = "import fastis; fastis.show_config()"
    check = (
        f"import torch, fastis.kernels as k; {show}; assert torch.cuda.is_available(), 'no GPU'; "
        "why = k.missing('cuda', 'update', 'cuda'); assert not why, why"
    )
    ready = Step("extension", python("-c", check), 60, python("-c", show))
    if call.run(ready) != 0:
        environment = ("FASTIS_CUDA", "1"), ("FASTIS_CUDA_ARCHS", os.environ.get("SM", "90"))
        build = python("setup.py", "-q", "build_ext", "--inplace")
        call.run(Step("build", build, 200, [], environment))
        if call.run(ready._replace(name="extension, built here")) != 0:
            return False
    return True


# The calls ----------------------------------------------------------------------------------------


def check(call: Call) -> None:
    smoke(call)
    count_compilations(call)
    tests(call)
    count_compilations(call)
    call.run(script(call, "ceilings", 40, "gpu_ceilings.py", small=("--megabytes", "1")))


def count_compilations(call: Call) -> None:
    """Kernels that the cache had, and those that had to be compiled after all."""
    new = cached_kernels(call) - call.compiled
    call.say(f"kernels of Triton: {call.compiled} found compiled, {new} compiled here")


def cached_kernels(call: Call) -> int:
    cache = Path(call.environment.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return len(list(cache.rglob("*.cubin")))


def smoke(call: Call) -> None:
    """Goes on after a case that took the device's context with it, in a new process."""
    first: list[str] = []
    while True:
        arguments = ["bench/gpu_smoke.py", "--json", str(call.rows), *first]
        rehearsal = python(*arguments, "--device", "cpu")
        code = call.run(Step("every kernel once", python(*arguments), 60, rehearsal))
        names = [row for row in rows_of(call.rows) if row.get("benchmark") == "smoke"]
        following = after(names[-1]["case"]) if names else None
        if code == 0 or following is None:
            return
        if names[-1]["outcome"] == "begun":
            call.say(f"{names[-1]['case']} took the process with it")
        first = ["--from", following]


def after(case: str) -> str | None:
    """The case of bench/gpu_smoke.py that follows, by its source: importing it takes torch."""
    names = (ROOT / "bench" / "gpu_smoke.py").read_text().split("@case\ndef ")[1:]
    order = [text.partition("(")[0] for text in names]
    following = order[order.index(case) + 1 :]
    return following[0] if following else None


def rows_of(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def has_module(name: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run(python("-c", code)).returncode == 0


def tests(call: Call) -> None:
    plain = ["-m", "pytest", "-m", "cuda and not slow", "-q", "-p", "no:cacheprovider"]
    collect = ["-m", "pytest", "--collect-only", "-q", "-p", "bench.gpu_pytest"]
    if has_module("xdist") and has_module("pytest_timeout"):
        many = ["-n", "8", "--timeout", "90", "-p", "bench.gpu_pytest", *TESTS]
        step = Step("GPU tests", python(*plain, *many), 150, python(*collect, *TESTS))
        call.run(step)
    else:
        for path in TESTS:
            rehearsal = python(*collect, path)
            call.run(Step(f"GPU tests: {path}", python(*plain, path), 160 // len(TESTS), rehearsal))


SMALL_LOSSES = ("--shape", "64x1000xbfloat16", "128x10xfloat32")
SMALL_SAMPLES = ("--size", "10000", "20000", "--alias-draws", "1000")


def bench(call: Call) -> None:
    call.run(script(call, "sampling", 120, "bench_gpu_sample.py", "--quick", "--size", "1e6", "1e8",
                    "--sigma", "1", "3", small=SMALL_SAMPLES))  # fmt: skip
    call.run(script(call, "losses", 90, "bench_gpu_loss.py", "--quick", small=SMALL_LOSSES))
    for shape in (BIG, MIDDLE):
        small = ("--shape", "64x1000xbfloat16")
        call.run(script(call, f"geometries for {shape}", 75, "bench_gpu_loss.py", "--tune",
                        "--quick", "--shape", shape, small=small))  # fmt: skip
    profile(call)


def profile(call: Call) -> None:
    """Counters of the kernels that decide: both passes of the large losses, update and draw."""
    if shutil.which("ncu") is None and not call.dry:
        call.say("ncu is not installed")
        return
    for name, small in (("losses", ("8", "3000")), ("sampler", ("2000", "64"))):
        command = [
            "ncu", "--clock-control", "none", "--csv", "--metrics", NCU_METRICS, "--kernel-name",
            "regex:label_|update_|draw_", "--launch-skip", "4", "--launch-count", "8",
            *python("bench/gpu_profiled.py", name),
        ]  # fmt: skip
        rehearsal = rehearsed("bench/gpu_profiled.py", name, *small)
        call.run(Step(f"ncu: {name}", command, 60, rehearsal))


def sanitize(call: Call) -> None:
    if shutil.which("compute-sanitizer") is None and not call.dry:
        call.say("compute-sanitizer is not installed")
        return
    # Without torch's caching allocator every tensor has bounds of its own to overstep; frees
    # inside of a capture are then errors of that allocator's.
    chosen = ["-k", "not graph and not captured", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    tests = ["-m", "pytest", *chosen, *TABLE_TESTS]
    command = [
        "compute-sanitizer", "--tool", "memcheck", "--kernel-regex", "kns=fastis",
        "--error-exitcode", "9", "--target-processes", "all", *python(*tests),
    ]  # fmt: skip
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    rehearsal = python(*tests, "--collect-only")
    call.run(Step("memcheck", command, 280, rehearsal, environment))


def full(call: Call) -> None:
    tuned = CARRY / "bench.json"  # of an earlier call, put there by hand
    winner = ("--winner", str(tuned)) if tuned.exists() and not call.dry else ()
    call.run(script(call, "losses", 200, "bench_gpu_loss.py", *winner, small=SMALL_LOSSES))
    call.run(script(call, "a step in one graph", 150, "bench_graph.py",
                    small=("--model", "mlp", "--turns", "1", "--size", "10000")))  # fmt: skip
    call.run(script(call, "sampling", 180, "bench_gpu_sample.py", small=SMALL_SAMPLES))
    step = script(call, "eager step", 60, "bench_step.py", "--device", "cuda",
                  small=("--pairs", "2", "--seconds", "0.01"))  # fmt: skip
    call.run(step._replace(rehearsal=[]))


CALLS: dict[str, Callable[[Call], None]] = {
    "check": check,
    "bench": bench,
    "sanitize": sanitize,
    "full": full,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.sh", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("call", choices=CALLS, nargs="?", default="check")
    parser.add_argument("--dry-run", action="store_true", help="go through the steps without a GPU")
    args = parser.parse_args(argv)
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    names = list(CALLS) if args.dry_run and argv_names_no_call(argv) else [args.call]
    failed = 0
    for name in names:
        call = Call(name, out, args.dry_run)
        if start(call):
            CALLS[name](call)
        failed |= call.finish()
    return failed


def argv_names_no_call(argv: list[str] | None) -> bool:
    return not set(sys.argv[1:] if argv is None else argv) & set(CALLS)


if __name__ == "__main__":
    sys.exit(main())
