# SPDX-License-Identifier: Apache-2.0
"""Launches kernels of a PTX text on a GPU, by the CUDA driver API through ctypes."""

import ctypes

import numpy as np
import torch

LIBRARY = "libcuda.so.1"


class Driver:
    """Loads PTX into torch's context on the current device; ``launch`` is as the simulator's."""

    def __init__(self, ptx: str, library: ctypes.CDLL | None = None, device: str = "cuda"):
        self.device = device
        torch.empty(1, device=device)  # torch makes its context the current one
        self.library = library or ctypes.CDLL(LIBRARY)
        self.module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self.module), ptx.encode())

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self.library, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(status, ctypes.byref(text))
            reason = (text.value or b"no such error").decode()
            raise RuntimeError(f"{function}: error {status}, {reason}")

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        *arrays: np.ndarray,
        shared_bytes: int = 0,
        updates: bool = False,
    ) -> None:
        """Run a kernel on copies of the arrays; those that are writeable get the copy back.

        Args:
            updates: is the simulator's business: outputs are copied to the device in any case.
        """
        kernel = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(kernel), self.module, name.encode())
        tensors = [
            torch.from_numpy(array.copy().view(np.uint8)).to(self.device) for array in arrays
        ]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        parameters = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(p) for p in pointers))
        stream = ctypes.c_void_p(self._stream())
        sizes = (*grid, *block, shared_bytes)
        self._call("cuLaunchKernel", kernel, *sizes, stream, parameters, None)
        for array, tensor in zip(arrays, tensors, strict=True):
            if array.flags.writeable:  # .cpu() waits for the kernel
                array.view(np.uint8)[...] = tensor.cpu().numpy()

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
