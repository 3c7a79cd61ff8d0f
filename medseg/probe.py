"""A quick look at how fast this machine trains a planned network."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from medseg.losses import DeepSupervision, DiceBCELoss
from medseg.plan_record import Plan

__all__ = ["fastest_precision", "step_seconds"]

PASSES = 2  # timed, after one that warms up
SLOW_S = 2.0  # a pass that takes longer is not repeated
CPU_VOXELS = 40_000  # of the trial on a CPU: fewer do not show what it can, more take long
PRECISIONS = ("32-true", "bf16-mixed")


def fastest_precision(plan: Plan, device: str) -> tuple[str, str, float]:
    """Precision, why, and seconds of a training step in it (NaN where it was not tried).

    On a CPU whichever of fp32 and bf16 does a step faster, by trying both; on a GPU bf16 where it has that, else fp16.
    """
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return "bf16-mixed", "not tried: there is no GPU here", math.nan
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU has it; no scaling of the loss as with fp16", step_seconds(plan, device)
        found = plan.model_copy(update={"precision": "16-mixed"})
        return "16-mixed", "the GPU has no bf16", step_seconds(found, device)
    seconds = {p: step_seconds(plan.model_copy(update={"precision": p}), device) for p in PRECISIONS}
    best = min(seconds, key=lambda p: seconds[p])
    other = next(p for p in PRECISIONS if p != best)
    why = f"the faster one on this CPU: {seconds[best]:.2f} s a step, {seconds[other]:.2f} s in {other}"
    return best, why, seconds[best]


def step_seconds(plan: Plan, device: str) -> float:
    """Seconds of one training step (network, loss, backward pass), by doing a few with random images.

    On a CPU a part of the patch, or a few small ones, stand for the batch, as time grows in proportion; a GPU does whole
    batches.
    """
    with torch.random.fork_rng():  # planning leaves the caller's random numbers as they were
        return _step_seconds(plan, torch.device(device))


def _step_seconds(plan: Plan, where: torch.device) -> float:
    layout: Any = torch.channels_last if plan.dims == 2 else torch.channels_last_3d
    network = plan.build().to(where).to(memory_format=layout).train()
    count, patch = plan.batch, plan.patch
    if where.type == "cpu":
        while math.prod(patch) > 2 * CPU_VOXELS:
            patch = tuple(n // 2 if n == max(patch) else n for n in patch)
        patch = tuple(-(-n // d) * d for n, d in zip(patch, network.divisor, strict=True))  # as it is padded inside
        few = math.ceil(CPU_VOXELS / math.prod(patch))
        count = max(2 if plan.encoder else 1, min(plan.batch, few))  # batch normalisation needs two
    images = torch.randn(count, len(plan.channels), *patch, device=where).to(memory_format=layout)
    shape = (count, len(plan.structures), *patch) if plan.overlapping else (count, *patch)
    target = torch.randint(0, 2, shape, device=where)
    loss = DeepSupervision(DiceBCELoss(exclusive=not plan.overlapping))
    kind = torch.float16 if plan.precision == "16-mixed" else torch.bfloat16
    best = math.inf
    for number in range(1 + PASSES):
        begin = time.perf_counter()
        with torch.autocast(where.type, kind, enabled=plan.precision != "32-true"):
            logits = network.multiscale(images)
        loss(logits, target).backward()
        network.zero_grad(set_to_none=True)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        seconds = time.perf_counter() - begin
        best = min(best, seconds) if number or seconds > SLOW_S else best
        if seconds > SLOW_S:
            break
    return best * (plan.batch * math.prod(plan.patch)) / (count * math.prod(patch))
