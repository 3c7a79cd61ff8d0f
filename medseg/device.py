"""The device that computes."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["has_bf16", "pick_device"]


def pick_device(device: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:n"; "auto" is a GPU where there is one.

    Raises
    ------
    ValueError
        If the name is none of these, or the GPU is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and device.split(":")[0] != "cuda":
        raise ValueError(f"device must be auto, cpu, cuda or cuda:n, got {device!r}")
    try:
        chosen = torch.device(device)
    except RuntimeError as problem:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:n, got {device!r}") from problem
    if chosen.type == "cuda" and not (torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count()):
        raise ValueError(
            f"device must be present, got {device} on a machine with {torch.cuda.device_count()} GPUs; use cpu"
        )
    return chosen


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by instructions of its own; False where torch cannot tell."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 or newer
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
