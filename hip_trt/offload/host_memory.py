"""Host memory that a GPU reads and writes directly: page-locked, mapped, near the GPU, in huge pages where possible.

Not torch's pin_memory: it rounds sizes up to powers of two, and keeps what is freed. Not managed memory: its pages
would move.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from hip_trt.errors import EnvironmentProblem, RuntimeInputError

_logger = logging.getLogger("hip_trt.offload")

_HUGE_PAGE: Final = 2 << 20
_MPOL_PREFERRED: Final = 1
_MBIND: Final = {"x86_64": 237, "aarch64": 235}  # the system call's number
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14
_POPULATED_AT_ONCE: Final = 64 << 20
_POPULATING_THREADS: Final = 8
# cuda.h
_REGISTER_FLAGS: Final = 0x1 | 0x2  # CU_MEMHOSTREGISTER_PORTABLE | _DEVICEMAP; the same bits in CU_MEMHOSTALLOC_
_PCI_ADDRESS_BYTES: Final = 16


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning, unless it was logged before: every layer and every cache would repeat it."""
    _logger.warning("%s", message)


class Refused(Exception):
    """What the driver says when it does not lock or map memory."""


class Host(Protocol):
    """What host memory needs of a device; tests have another one, without a GPU."""

    @property
    def device(self) -> torch.device: ...

    def register(self, address: int, size: int) -> int:
        """Lock pages and map them; returns their address on the device.

        Raises:
            Refused: the driver does not.
        """
        ...

    def unregister(self, address: int) -> None: ...

    def allocate(self, size: int) -> tuple[int, int]:
        """Locked and mapped memory by the driver's own means: its addresses on the host and on the device.

        Raises:
            Refused: the driver does not.
        """
        ...

    def free(self, address: int) -> None: ...

    def view(self, address: int, size: int) -> Tensor:
        """[size] uint8 on the device: mapped memory at a device address."""
        ...

    def numa_node(self) -> int | None:
        """The memory that is nearest; None if the machine does not say."""
        ...

    def synchronize(self) -> None:
        """Wait until nothing that was launched is running."""
        ...


def host_for(device: torch.device) -> Host:
    """The host side of a device.

    Raises:
        RuntimeInputError: it is no GPU.
    """
    if device.type != "cuda":
        raise RuntimeInputError(
            f"offload: the model runs on {device}, where the KV cache is in host memory already.",
            "Leave offload out (--offload), or run an engine plan or a model on a GPU.",
        )
    return CudaHost(device)


class CudaHost:
    """Host memory of a CUDA GPU, through the driver: a refusal leaves no error behind in PyTorch's CUDA runtime."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._cuda = ctypes.CDLL("libcuda.so.1")

    def register(self, address: int, size: int) -> int:
        mapped = ctypes.c_uint64()
        self._call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(size), _REGISTER_FLAGS)
        try:
            self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(mapped), ctypes.c_void_p(address), 0)
        except Refused:
            self.unregister(address)
            raise
        return mapped.value

    def unregister(self, address: int) -> None:
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def allocate(self, size: int) -> tuple[int, int]:
        address, mapped = ctypes.c_void_p(), ctypes.c_uint64()
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), _REGISTER_FLAGS)
        try:
            self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(mapped), address, 0)
        except Refused:
            self.free(address.value or 0)
            raise
        return address.value or 0, mapped.value

    def free(self, address: int) -> None:
        self._call("cuMemFreeHost", ctypes.c_void_p(address))

    def view(self, address: int, size: int) -> Tensor:
        tensor = torch.as_tensor(_Mapped(address, size), device=self.device)
        if tensor.data_ptr() != address:  # torch has taken it for another device's, and copied
            raise EnvironmentProblem(f"offload: PyTorch {torch.__version__} does not take mapped memory as it is.")
        return tensor

    def numa_node(self) -> int | None:
        text = ctypes.create_string_buffer(_PCI_ADDRESS_BYTES)
        try:
            self._call("cuDeviceGetPCIBusId", text, len(text), self.device.index)
            node = int(Path("/sys/bus/pci/devices", text.value.decode().lower(), "numa_node").read_text())
        except (Refused, OSError, ValueError):
            return None
        return node if node >= 0 else None

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def _call(self, function: str, *arguments: object) -> None:
        """One call of the driver, with the device's context current."""
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()
            status = getattr(self._cuda, function)(*arguments)
        if status != 0:
            name = ctypes.c_char_p()
            self._cuda.cuGetErrorName(status, ctypes.byref(name))
            raise Refused(f"{function}: {(name.value or b'CUDA error').decode()} ({status})")


class _Mapped:
    """An address on the device, in the form that torch.as_tensor takes without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }


class HostMemory:
    """A range of locked, mapped host memory, until :meth:`close`.

    Memory is mapped anonymously, so that nothing of it outlives the process, however that ends.

    Args:
        host: of the device that uses it.
        size: bytes.

    Attributes:
        size: bytes.
        registered: False where the driver did not register memory of ours and gave some of its own, which has no huge
            pages and perhaps lies on another NUMA node: as correct, maybe slower.

    Raises:
        EnvironmentProblem: the driver refuses both.
        RuntimeInputError: the kernel has no address space left.
    """

    def __init__(self, host: Host, size: int) -> None:
        self.size = size
        self._host = host
        self._map: mmap.mmap | None = None
        try:
            self._map = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise RuntimeInputError(f"offload: no {size:,} bytes of host memory: {error}.") from None
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._address = -(-first // _HUGE_PAGE) * _HUGE_PAGE
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            _advise(self._map, advice)
        _prefer_node(self._address, size, host.numa_node())
        _populate(self._address, size)
        try:
            self._device_address = host.register(self._address, size)
            self.registered = True
        except Refused as refusal:
            self._map.close()
            self._map, self.registered = None, False
            try:
                self._address, self._device_address = host.allocate(size)
            except Refused as second:
                raise EnvironmentProblem(
                    f"offload: CUDA does not lock {size:,} bytes of host memory ({refusal}; {second}).",
                    "Lower the number of pages, or let this process lock memory (ulimit -l, a container's limits).",
                ) from None
            warn_once(f"host memory is the driver's own, perhaps slower: {refusal}")
        except BaseException:
            self._map.close()
            raise

    def device_bytes(self) -> Tensor:
        """[size] uint8 on the device. Not to be used after :meth:`close`."""
        return self._host.view(self._device_address, self.size)

    def host_bytes(self) -> Tensor:
        """[size] uint8 on the CPU: the same memory. Not to be used after :meth:`close`."""
        return torch.frombuffer((ctypes.c_uint8 * self.size).from_address(self._address), dtype=torch.uint8)

    def close(self) -> None:
        """Give the memory back; the caller has waited for the device. Nothing happens the second time."""
        address, self._address = self._address, 0
        if not address:
            return
        try:
            (self._host.unregister if self._map is not None else self._host.free)(address)
        except (Refused, RuntimeError) as error:  # a device that has failed refuses all; the mapping goes all the same
            warn_once(str(error))
        if self._map is not None:
            self._map.close()


def _advise(memory: mmap.mmap, advice: str) -> None:
    """madvise, where Python and the kernel know the advice."""
    try:
        memory.madvise(getattr(mmap, advice))
    except (AttributeError, OSError):
        _logger.debug("no %s", advice)


def _populate(address: int, size: int) -> None:
    """Have the kernel clear pages on several cores, as locking them would on one. Where it does not know how, locking
    does it."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

    def populate(start: int) -> None:
        madvise(address + start, min(_POPULATED_AT_ONCE, size - start), _MADV_POPULATE_WRITE)

    try:
        with ThreadPoolExecutor(min(_POPULATING_THREADS, len(os.sched_getaffinity(0)))) as pool:
            list(pool.map(populate, range(0, size, _POPULATED_AT_ONCE)))
    except RuntimeError as error:  # no thread to be had, where a limit is near
        _logger.debug("pages are cleared as they are locked: %s", error)


def _prefer_node(address: int, size: int, node: int | None) -> None:
    """Have pages come from a NUMA node while it has some: mbind(2), called directly as the C library lacks it."""
    number = _MBIND.get(platform.machine())
    if node is None or number is None:
        return
    bits = ctypes.sizeof(ctypes.c_ulong) * 8
    mask = (ctypes.c_ulong * (node // bits + 1))()
    mask[node // bits] = 1 << node % bits
    result = ctypes.CDLL(None, use_errno=True).syscall(
        ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(_MPOL_PREFERRED), mask,
        ctypes.c_ulong(len(mask) * bits + 1), ctypes.c_uint(0),
    )
    if result != 0:
        _logger.debug("mbind to node %d: %s", node, ctypes.get_errno())
