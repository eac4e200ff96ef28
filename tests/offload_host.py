"""Offload without a GPU: host memory that is the device's own, and torch.ops.hip_trt on emulated kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import EmulatedLibrary
from torch import Tensor

from hip_trt import library as libraries
from hip_trt import ops
from hip_trt.config import HipConfig
from hip_trt.offload import host_memory
from hip_trt.offload.host_memory import Refused

CPU = torch.device("cpu")


class FakeHost:
    """A driver that maps memory to where it is, and remembers what it was asked.

    Args:
        library: whose streams :meth:`synchronize` waits for.

    Attributes:
        registered: bytes by address, now.
        allocated: likewise, memory of the driver's own.
        most_held: ranges at once, at most.
        waits: calls of synchronize.
        refuse: registrations and allocations left until it refuses; None: never.
    """

    device = CPU

    def __init__(self, library: EmulatedLibrary | None = None) -> None:
        self._library = library
        self.registered: dict[int, int] = {}
        self.allocated: dict[int, Any] = {}
        self.most_held = self.waits = 0
        self.refuse_registration = False
        self.refuse: int | None = None

    def _count(self) -> None:
        if self.refuse is not None:
            if self.refuse == 0:
                raise Refused("cuMemHost: CUDA_ERROR_OUT_OF_MEMORY (2)")
            self.refuse -= 1

    def register(self, address: int, size: int) -> int:
        if self.refuse_registration:
            raise Refused("cuMemHostRegister_v2: CUDA_ERROR_NOT_SUPPORTED (801)")
        self._count()
        assert not any(start < address + size and address < start + held for start, held in self.registered.items())
        ctypes.memset(address, 0xFF, size)  # NaN in every type: what is undefined must not show
        self.registered[address] = size
        self.most_held = max(self.most_held, self.held)
        return address

    def unregister(self, address: int) -> None:
        assert self.waits, "the device may still be using it"
        del self.registered[address]

    def allocate(self, size: int) -> tuple[int, int]:
        self._count()
        memory = (ctypes.c_uint8 * size)()
        address = ctypes.addressof(memory)
        self.allocated[address] = memory
        self.most_held = max(self.most_held, self.held)
        return address, address

    def free(self, address: int) -> None:
        assert self.waits
        del self.allocated[address]

    def view(self, address: int, size: int) -> Tensor:
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)

    def numa_node(self) -> int | None:
        return 0

    def synchronize(self) -> None:
        self.waits += 1
        if self._library is not None:
            self._library.synchronize()

    @property
    def held(self) -> int:
        """Ranges that have not been given back."""
        return len(self.registered) + len(self.allocated)


def emulate(monkeypatch: pytest.MonkeyPatch, library: EmulatedLibrary) -> FakeHost:
    """Make the CPU a device to offload from, whose operator is the emulated library."""
    host = FakeHost(library)
    host_memory.warn_once.cache_clear()
    monkeypatch.setattr(host_memory, "host_for", lambda device: host)
    monkeypatch.setattr(libraries, "load", lambda: library)
    monkeypatch.setattr(ops, "reference", SimpleNamespace(hip_attention=operator_of(library)))
    return host


def operator_of(library: EmulatedLibrary) -> Any:
    """:func:`hip_trt.reference.hip_attention` by a library, in place."""

    def hip_attention(*tensors: Tensor, config: HipConfig, scale: float, dense: bool = False) -> tuple[Tensor, ...]:
        given = [tensor.contiguous() for tensor in tensors]
        return library.attention(
            *given, config=config, scale=scale, dense=dense, present_key=given[3], present_value=given[4]
        )

    return hip_attention


@contextmanager
def nothing_left(host: FakeHost) -> Iterator[None]:
    """All host memory is given back at the end."""
    yield
    assert host.held == 0
