# SPDX-License-Identifier: Apache-2.0
"""Random numbers of a run: seeded, put into a checkpoint and brought back."""

import os
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed torch, numpy and Python, and settle the arithmetic of CUDA.

    float32 means float32: the published numbers were made without TF32, and so are ours. The rank
    that a launcher puts into the environment variable ``RANK`` is added to the seed, so that ranks
    drop out differently.

    Args:
        seed (int): in [0, 2**32).
        deterministic (bool): only deterministic algorithms. An operation that has none raises.
    """
    rank = os.environ.get("RANK", "")
    seed = (seed + (int(rank) if rank.isdecimal() else 0)) % 2**32
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matmul
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def random_state() -> dict[str, Any]:
    """The state of all generators, for a checkpoint: tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a state of `random_state`.

    On another number of GPUs theirs stay as they were seeded.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
