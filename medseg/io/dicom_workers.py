"""Compressed frames decoded in parallel.

The codecs hold Python's global lock while they decode, so threads gain nothing; processes do. They are started as plain
``python -m medseg.io.dicom_workers``, which needs no guard in the caller's script and no fork of a process that may have
torch threads running, and are fed through pipes: one line of JSON, then bytes. A frame that crashes a codec takes down its
worker only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medseg.io.dicom_decode import decode_frame
from medseg.volume import DicomError

__all__ = ["Task", "decode_parallel", "worker_count"]

Array = NDArray[Any]
PIXELS_A_WORKER = 4 << 20  # decoding these takes longer than starting a process
MOST_WORKERS = 8


@dataclass(frozen=True)
class Task:
    """One compressed frame and what :func:`decode_frame` must know of it."""

    key: Any
    frame: bytes
    syntax: str
    options: Mapping[str, Any]
    name: str


def worker_count(pixels: int) -> int:
    """How many processes it is worth starting to decode this many pixels; 1 for none."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, MOST_WORKERS, pixels // PIXELS_A_WORKER))


def decode_parallel(tasks: Iterable[Task], workers: int) -> Iterator[tuple[Any, Array]]:
    """Key and stored values of each frame, in the order of the tasks; at most two frames a worker are in flight.

    Raises
    ------
    DicomError
        As :func:`medseg.io.dicom_decode.decode_frame`, or if a frame crashes its codec.
    """
    if workers <= 1:
        for t in tasks:
            yield t.key, decode_frame(t.frame, t.syntax, t.options, t.name)
        return
    team = [_Worker() for _ in range(workers)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for one in team:
        free.put(one)

    def run(task: Task) -> Array:
        one = free.get()
        try:
            return one.decode(task)
        finally:
            free.put(one)

    waiting: deque[tuple[Any, Future[Array]]] = deque()
    try:
        with ThreadPoolExecutor(workers) as pool:
            for task in tasks:
                waiting.append((task.key, pool.submit(run, task)))
                if len(waiting) >= 2 * workers:
                    key, result = waiting.popleft()
                    yield key, result.result()
            while waiting:
                key, result = waiting.popleft()
                yield key, result.result()
    finally:
        for one in team:
            one.close()


class _Worker:
    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "medseg.io.dicom_workers"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip

    def decode(self, task: Task) -> Array:
        sender, receiver = self.process.stdin, self.process.stdout
        if sender is None or receiver is None:
            raise DicomError(f"decoder must run, got no process for {task.name}")
        head = {"syntax": task.syntax, "options": dict(task.options), "name": task.name, "size": len(task.frame)}
        try:
            _send(sender, head, task.frame)
            reply = _line(receiver)
            if "error" in reply:
                raise DicomError(str(reply["error"]))
            return np.frombuffer(_exactly(receiver, reply["size"]), reply["dtype"]).reshape(reply["shape"])
        except (EOFError, OSError, json.JSONDecodeError):
            raise DicomError(f"frame must be decodable, got a crash of the codec on {task.name}") from None

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue  # the worker is gone and with it what was still to be flushed
        self.process.kill()
        self.process.wait()


def _send(stream: IO[bytes], head: Mapping[str, Any], data: bytes | memoryview) -> None:
    stream.write(json.dumps(head).encode() + b"\n")
    stream.write(data)
    stream.flush()


def _line(stream: IO[bytes]) -> dict[str, Any]:
    line = stream.readline()
    if not line:
        raise EOFError
    found: dict[str, Any] = json.loads(line)
    return found


def _exactly(stream: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        done += got
    return data


def main() -> None:
    """Decode what stdin brings until it ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a codec prints must not get between the replies
    while True:
        try:
            head = _line(sys.stdin.buffer)
            frame = _exactly(sys.stdin.buffer, head["size"])
        except EOFError:
            return
        try:
            array = np.ascontiguousarray(decode_frame(bytes(frame), head["syntax"], head["options"], head["name"]))
        except DicomError as error:
            _send(replies, {"error": str(error)}, b"")
            continue
        _send(replies, {"shape": array.shape, "dtype": array.dtype.str, "size": array.nbytes}, array.tobytes())


if __name__ == "__main__":
    main()
