"""Time and peak memory of a call, each repeat in a freshly forked process."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """Median wall and CPU seconds, and peak resident memory (MB) above that before the call."""

    seconds: float
    cpu_s: float
    peak_mb: float
    note: str = ""


def _memory_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _once(run: Callable[..., Any], prepare: Callable[[], Any] | None) -> list[Any]:
    inputs = () if prepare is None else (prepare(),)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, not from the preparation's own peak
    before, wall, cpu = _memory_mb("VmRSS"), time.perf_counter(), time.process_time()
    result = run(*inputs)
    taken = [time.perf_counter() - wall, time.process_time() - cpu, _memory_mb("VmHWM") - before]
    return [*taken, result if isinstance(result, str) else ""]


def measure(run: Callable[..., Any], prepare: Callable[[], Any] | None = None, repeats: int = 3) -> Measurement:
    """Call ``run(prepare())`` (``run()`` without ``prepare``) ``repeats`` times, each in a forked child; medians.

    Only ``run`` is measured. A string that it returns is kept as the note. The parent must not have computed with
    several threads before, since those do not survive a fork.
    """
    rows = []
    for _ in range(repeats):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(writer, json.dumps(_once(run, prepare)).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        if not answer:
            return Measurement(float("nan"), float("nan"), float("nan"), "failed")
        rows.append(json.loads(answer))
    return Measurement(*(statistics.median(r[column] for r in rows) for column in range(3)), rows[0][3])


def show(title: str, rows: Mapping[str, Measurement], ours: str) -> None:
    """Print a table; the ratio is that of CPU seconds to the row named ``ours`` (above 1: slower than ours)."""
    print(f"\n### {title}\n\n| way | seconds | CPU s | ratio | peak MB | note |\n| --- | --- | --- | --- | --- | --- |")
    for name, m in rows.items():
        ratio = m.cpu_s / rows[ours].cpu_s
        print(f"| {name} | {m.seconds:.3f} | {m.cpu_s:.3f} | {ratio:.2f} | {m.peak_mb:.0f} | {m.note} |", flush=True)
