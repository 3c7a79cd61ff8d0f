"""The cache of embeddings: bounded, verified, shared by processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.embeddings import EmbeddingCache, embedding_key

KEYS = [f"{n:032x}" for n in range(20)]
SHAPE = (1, 16, 8, 8)  # 2048 bytes in float16, and a header


def value(n: int) -> torch.Tensor:
    return torch.full(SHAPE, float(n))


def never() -> torch.Tensor:
    raise AssertionError("must come from the cache")


def test_made_once_and_kept(tmp_path: Path) -> None:
    embedding = torch.randn(SHAPE)
    found = EmbeddingCache(tmp_path / "new" / "cache", 10**6).get(KEYS[0], lambda: embedding)
    again = EmbeddingCache(tmp_path / "new" / "cache", 10**6).get(KEYS[0], never)
    assert again.dtype == torch.float16
    assert torch.equal(found, embedding.half()) and torch.equal(again, found)


def test_keys_tell_images_encoders_windows_and_sizes_apart() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    known = {
        embedding_key(image, "a"),
        embedding_key(image.T.copy(), "a"),
        embedding_key(image.astype(np.int16), "a"),
        embedding_key(image, "b"),
        embedding_key(image, "a", (-160, 240)),
        embedding_key(image, "a", "lung"),
        embedding_key(image, "a", None, 256),
    }
    assert len(known) == 7
    assert embedding_key(image, "a", [-160, 240.0]) == embedding_key(np.asfortranarray(image), "a", (-160.0, 240))


def test_used_longest_ago_goes_first(tmp_path: Path) -> None:
    (tmp_path / "foreign.safetensors").write_bytes(b"x" * 50_000)
    cache = EmbeddingCache(tmp_path, 10_000)  # room for four
    for n in range(4):
        cache.get(KEYS[n], lambda n=n: value(n))
        time.sleep(0.01)
    cache.get(KEYS[0], never)
    for n in range(4, 7):
        time.sleep(0.01)
        cache.get(KEYS[n], lambda n=n: value(n))
        sizes = [p.stat().st_size for p in tmp_path.glob("*.embedding.safetensors")]
        assert sum(sizes) <= 10_000
    for n in (0, 4, 5, 6):
        assert torch.equal(cache.get(KEYS[n], never), value(n).half())
    assert len(list(tmp_path.iterdir())) == 5  # and no temporary file
    with pytest.raises(AssertionError, match="must come"):
        cache.get(KEYS[1], never)


def test_a_removed_entry_stays_valid(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, 3000)  # room for one
    first = cache.get(KEYS[0], lambda: value(7))
    first = cache.get(KEYS[0], never)
    cache.get(KEYS[1], lambda: value(8))
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(first, value(7).half())


def test_memory_only_is_bounded() -> None:
    cache = EmbeddingCache(None, 5000)  # room for two
    for n in (0, 1, 2):
        cache.get(KEYS[n], lambda n=n: value(n))
    assert list(cache.memory) == KEYS[1:3]
    assert torch.equal(cache.get(KEYS[1], never), value(1).half())
    assert list(cache.memory) == [KEYS[2], KEYS[1]]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damaged_entries_are_made_anew(tmp_path: Path, damage: str) -> None:
    cache = EmbeddingCache(tmp_path, 10**6)
    cache.get(KEYS[0], lambda: value(3))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes({"cut": content[:-10], "flipped": content, "empty": b"", "text": b"hello" * 100}[damage])
    assert torch.equal(cache.get(KEYS[0], lambda: value(4)), value(4).half())
    assert torch.equal(cache.get(KEYS[0], never), value(4).half())


FILL = """
import sys, torch
from medseg.embeddings import EmbeddingCache
cache = EmbeddingCache(sys.argv[1], 12_000)
for turn in range(6):
    for n in range(8):
        found = cache.get(f"{n:032x}", lambda: torch.full((1, 16, 8, 8), float(n)))
        assert bool((found == n).all()), n
"""


def test_two_processes_fill_one_folder(tmp_path: Path) -> None:
    # Room for five of eight entries: both remove what the other reads.
    both = [subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]
    assert all(p.name.endswith(".embedding.safetensors") for p in tmp_path.iterdir())
    assert 0 < sum(p.stat().st_size for p in tmp_path.iterdir()) <= 15_000  # one entry more while both write


def test_bad_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache must be a folder that can be written to, got .*file"):
        EmbeddingCache(tmp_path / "file", 1000)
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ValueError, match=r"cache must be a folder that can be written to, got .*locked"):
            EmbeddingCache(tmp_path / "locked", 1000)
    with pytest.raises(ValueError, match="cache size must be positive, got 0"):
        EmbeddingCache(tmp_path, 0)
    cache = EmbeddingCache(tmp_path, 1000)
    with pytest.raises(ValueError, match=r"key must be .* got '\.\./up'"):
        cache.get("../up", never)
    with pytest.raises(ValueError, match="must be finite in float16"):
        cache.get(KEYS[0], lambda: torch.tensor([1e6]))
    assert not list(tmp_path.glob("*.safetensors"))
    assert torch.equal(cache.get(KEYS[0], lambda: value(1)), value(1).half())  # too large to keep
    assert not list(tmp_path.glob("*.safetensors"))
