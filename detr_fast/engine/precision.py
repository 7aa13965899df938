# SPDX-License-Identifier: Apache-2.0
"""In which precision the products of a model are computed."""

import platform
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from detr_fast.config import Config, UsageError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TENSOR_CORES = (7, 0)  # the compute capability from which float16 is faster than float32


@dataclass(frozen=True)
class Precision:
    """Precision of matrix products and convolutions; weights and losses stay float32.

    Also float32 are box coordinates, the statistics of softmax and layer norm, and the position
    encoding until it is added to what is rounded.

    Attributes:
        device (torch.device): where the model is.
        dtype (torch.dtype | None): of products; None: that of the weights.
        reason (str): why this one.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    reason: str = ""

    @classmethod
    def of(cls, config: Config, device: torch.device, *, training: bool) -> "Precision":
        """The precision of ``--amp``.

        ``auto`` takes bfloat16 to train where the device computes in it, and to evaluate always
        float32, so that an AP does not depend on the machine. It never takes float16, whose range
        some trainings of DETR leave.

        Args:
            config (Config): the flags.
            device (torch.device): where the model is.
            training (bool): whether it learns.

        Raises:
            UsageError: if the device cannot compute in what is asked for.
        """
        if config.backend == "reference":
            return cls(device, None, "--backend reference")
        if config.amp == "off":
            return cls(device, None, "--amp off")
        if config.amp == "auto":
            if not training:
                return cls(device, None, "--amp auto")
            native, why = _native_bfloat16(device)
            return cls(device, torch.bfloat16 if native else None, f"--amp auto: {why}")
        dtype = _DTYPES[config.amp]
        if why_not := _why_not(device, dtype):
            raise UsageError(f"--amp {config.amp}: {why_not}: try --amp auto or --amp off")
        slow = device.type == "cpu" and not _cpu_computes_in(dtype)
        note = ": slow, this CPU has no such arithmetic" if slow else ""
        return cls(device, dtype, f"--amp {config.amp}{note}")

    def __str__(self) -> str:
        name = str(self.dtype or torch.float32).removeprefix("torch.")
        return f"{name} ({self.reason})" if self.reason else name

    def autocast(self) -> AbstractContextManager:
        """Within this context products are computed in `dtype`."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients leave the range of the dtype unless the loss is scaled."""
        return self.dtype == torch.float16

    @property
    def images(self) -> torch.dtype:
        """The dtype that the model's images shall have."""
        return self.dtype or torch.float32


def _native_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Whether a device computes in bfloat16, and that in words."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return True, "this GPU computes in it"
            cores = torch.cuda.get_device_capability() >= _TENSOR_CORES
        return False, "this GPU has no bfloat16" + "; --amp fp16 is faster" * cores
    if device.type == "cpu":
        native = _cpu_computes_in(torch.bfloat16)
        return native, f"this CPU {'computes in it' if native else 'has no bfloat16'}"
    return False, "bfloat16 is taken on CUDA and on CPUs"


def _cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products in a dtype of 16 bits, and torch uses them."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN's own answer holds wherever it can convert
        queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in queries)
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    query = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", bool)
    return bool(query())


def _why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why autocast to a dtype does not work on a device, found by trying; nothing where it does."""
    if not torch.amp.is_autocast_available(device.type):
        return f"torch has no autocast for {device.type}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a dtype that is not known disables autocast
            with torch.autocast(device.type, dtype=dtype):
                weight = torch.zeros(8, 8, 3, 3, device=device, requires_grad=True)
                out = F.conv2d(torch.zeros(1, 8, 8, 8, device=device), weight)
                F.linear(out, weight[0, 0, :1].repeat(1, 2)).sum().backward()
    except (RuntimeError, UserWarning) as error:
        return f"{device} cannot compute in {dtype} ({str(error).splitlines()[0]})"
    return ""
