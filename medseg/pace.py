"""What the training loop goes by: learning rate, plateau, memory; a bar to watch it; a way to stop it."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if sys.platform != "win32":
    import resource

__all__ = ["PLATEAU", "flat_since", "memory_format", "peak_bytes", "schedule", "stops", "training_bar"]

WARM_UP = 0.03  # share of the training over which the learning rate rises
PLATEAU = 0.002  # change of the validation IoU that counts as none


def memory_format(dims: int) -> torch.memory_format:
    """Channels last: several times as fast on a CPU."""
    return torch.channels_last if dims == 2 else torch.channels_last_3d


def schedule(progress: float) -> float:
    """Learning rate as a share of its maximum: a short linear rise, then half a cosine down to 0."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def flat_since(history: Sequence[dict[str, float]]) -> float:
    """Share of the training after which the validation IoU stayed within ``PLATEAU`` of its best."""
    best = max((h["iou"] for h in history if math.isfinite(h["iou"])), default=math.nan)
    flat = 1.0
    for entry in reversed(history):
        if not entry["iou"] >= best - PLATEAU:
            break
        flat = entry["progress"]
    return flat


def peak_bytes() -> int:
    """Most memory that this process had at a time."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def stops(ask: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C, or SIGTERM as schedulers send, asks politely the first time and stops at once the second time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[bool] = []

    def handle(*_: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        ask()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def training_bar(shown: bool) -> Iterator[Any]:
    """A progress bar on stderr; gives the function of share, words and seconds left that sets it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2, disable=not shown) as bar:
        task = bar.add_task("training", total=1.0, left="")

        def show(share: float, words: str, left: float) -> None:
            bar.update(task, completed=share, description=words, left=f"{int(left // 60)}:{int(left % 60):02d} left")

        yield show
