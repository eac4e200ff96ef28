"""The GPUs of this machine, asked from the CUDA driver itself, so that neither PyTorch nor a toolkit is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

_NAME_BYTES: Final = 256
# CUdevice_attribute in cuda.h.
_COMPUTE_CAPABILITY_MAJOR: Final = 75
_COMPUTE_CAPABILITY_MINOR: Final = 76


@dataclass(frozen=True, order=True)
class ComputeCapability:
    """A GPU generation, such as 8.9."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> ComputeCapability:
        """Read "8.9".

        Raises:
            ValueError: for any other form.
        """
        major, dot, minor = text.strip().partition(".")
        if not (dot and major.isdecimal() and minor.isdecimal() and len(minor) == 1):
            raise ValueError(f"{text!r} is not a compute capability such as 8.9")
        return cls(int(major), int(minor))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True)
class Gpu:
    """One CUDA device.

    Attributes:
        memory: bytes of device memory.
    """

    index: int
    name: str
    compute_capability: ComputeCapability
    memory: int


@dataclass(frozen=True)
class Driver:
    """The CUDA driver.

    Attributes:
        cuda: newest CUDA version that it runs, such as "13.0".
        gpus: the devices that it shows; CUDA_VISIBLE_DEVICES counts.
    """

    cuda: str
    gpus: tuple[Gpu, ...]


def cuda_driver() -> Driver | None:
    """The CUDA driver and its GPUs; None where no driver is installed."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    usable = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
    gpus = tuple(_device(cuda, index) for index in range(count.value)) if usable else ()
    return Driver(cuda=f"{version.value // 1000}.{version.value % 1000 // 10}", gpus=gpus)


def current_gpu() -> Gpu | None:
    """The first GPU; None where there is none."""
    driver = cuda_driver()
    return driver.gpus[0] if driver and driver.gpus else None


def _device(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    capability = ComputeCapability(attribute(_COMPUTE_CAPABILITY_MAJOR), attribute(_COMPUTE_CAPABILITY_MINOR))
    return Gpu(index, name.value.decode(errors="replace"), capability, memory.value)
