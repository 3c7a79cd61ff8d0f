"""What promptable models cost: an embedding, a prompt, and a training step that encodes or takes cached embeddings.

OMP_NUM_THREADS=1 python workflows/bench/sam.py [--repeats 5] [--threads 1]

CPU seconds, so that other work on the machine does not count; medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from medseg.embeddings import EmbeddingCache, embedding_key
from medseg.losses import DiceBCELoss
from medseg.models.sam import load_promptable

SIDE = 256  # pixels of the slice
PROMPTS = (1, 8, 32)  # decoded together


@dataclass(frozen=True)
class Options:
    """How often and with what."""

    repeats: int = 5
    """Measurements, of which the median counts."""
    threads: int = 1
    """Of torch."""
    batch: int = 8
    """Prompts, each on a slice of its own, in a training step."""
    model: str = "lite-medsam"
    """Name of the model."""
    checkpoint: str | None = None
    """File with its weights, where no package brings them."""
    device: str = "cpu"
    """cpu or cuda: wall seconds there."""


def cost(run: Callable[[], object], repeats: int, device: str) -> float:
    """Median seconds of a call: of CPU, or on a GPU of wall."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = []
    for _ in range(repeats):
        begin = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(clock() - begin)
    return statistics.median(seconds)


def main(options: Options) -> None:
    """Print the table."""
    torch.set_num_threads(options.threads)
    model = load_promptable(options.model, options.checkpoint).to(options.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, SIDE, SIDE, generator=generator).to(options.device)
    box = torch.tensor([60.0, 70, 180, 190], device=options.device)
    target = torch.zeros(options.batch, 1, SIDE, SIDE, device=options.device)
    target[..., 70:190, 60:180] = 1
    optimizer = torch.optim.AdamW(model.mask_decoder.parameters(), 1e-5)
    loss = DiceBCELoss(exclusive=False)

    def prompt(count: int) -> None:
        with torch.no_grad():
            model.decode(embedding, torch.zeros(count, dtype=torch.long), (SIDE, SIDE), boxes=box.expand(count, 4))

    def step(embeddings: torch.Tensor) -> None:
        each = torch.arange(options.batch)
        logits, _ = model.decode(embeddings, each, (SIDE, SIDE), boxes=box.expand(options.batch, 4))
        optimizer.zero_grad()
        loss(logits, target).backward()
        optimizer.step()

    embedding = model.encode(images[:1])
    rows = {"embedding of one slice": cost(lambda: model.encode(images[:1]), options.repeats, options.device)}
    for count in PROMPTS:
        seconds = cost(lambda count=count: prompt(count), options.repeats, options.device)
        rows[f"one of {count} boxes on a slice, decoded together"] = seconds / count
    with tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache(folder, 10**9)
        slices = [(image.cpu().numpy() * 255).astype(np.uint8) for image in images]

        def cached() -> torch.Tensor:
            keys = [embedding_key(image, model.fingerprint, None, model.size) for image in slices]
            pairs = zip(keys, images, strict=True)
            found = [cache.get(key, lambda image=image: model.encode(image[None])[0]) for key, image in pairs]
            return torch.stack(found).to(options.device, torch.float32)

        cached()
        rows[f"reading {options.batch} embeddings from the cache"] = cost(cached, options.repeats, options.device)
        fast = cost(lambda: step(cached()), options.repeats, options.device)
    slow = cost(lambda: step(model.encode(images)), options.repeats, options.device)
    rows[f"training step of {options.batch} prompts from the cache"] = fast
    rows["the same, encoding the slices"] = slow
    print(f"{options.model}, {options.threads} threads, {options.device}\n\n| what | seconds |\n| --- | --- |")
    for name, seconds in rows.items():
        print(f"| {name} | {seconds:.3f} |")
    print(f"\na step from the cache is {slow / fast:.1f} times as cheap")


if __name__ == "__main__":
    main(tyro.cli(Options))
