"""A KV pool on CPU in memory that the other workers of the host can read: an anonymous file of the kernel's (memfd).

May import torch. The file is the pool's only memory. It isn't in /dev/shm, which is small in containers; all its pages
are there from the start, and its size is sealed, so that nothing can take memory away under a running worker. Others
read it with `pread`: they map nothing, so that nobody's resident memory or page tables grow.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_flying.worker.large_pages import map_aligned, use_large_pages, wants_large_pages


class CanNotShare(RuntimeError):
    """KV can't be read in place here; the text says why."""


@dataclass(frozen=True)
class PoolOffer:
    """Where other processes find a pool: plain values, sent to all workers."""

    pid: int
    fd: int
    name: str
    """The file's, chosen at random: it proves that who reads it sees the processes of the same host."""
    layers: tuple[int, ...]
    """Bytes from the beginning of the file to each layer."""


class HostPool:
    """One worker's KV pool, zeroed. Lives as long as its process."""

    def __init__(self, num_bytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise CanNotShare("this system has no memfd_create")
        self._name = f"vllm-flying-kv-{uuid.uuid4().hex}"
        self._fd = -1
        try:
            self._fd = os.memfd_create(self._name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._fd, num_bytes)
            # Pages that aren't to be had are refused here; touching such a page later would end the process.
            os.posix_fallocate(self._fd, 0, num_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.buffer = map_aligned(self._fd, num_bytes)
        except OSError as error:
            if self._fd >= 0:
                os.close(self._fd)
            raise CanNotShare(f"no shared memory of {num_bytes} bytes: {error}") from error
        if wants_large_pages():
            use_large_pages(self.buffer)
        self.buffer.zero_()

    def offer(self, layers: Sequence[torch.Tensor]) -> PoolOffer:
        """`layers` are views of the buffer."""
        begin = self.buffer.data_ptr()
        return PoolOffer(os.getpid(), self._fd, self._name, tuple(layer.data_ptr() - begin for layer in layers))


class OtherPool:
    """Another worker's KV pool, to be read."""

    def __init__(self, offer: PoolOffer) -> None:
        self._layers = offer.layers
        try:
            self._fd = os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CanNotShare(f"the pool of process {offer.pid} can't be opened: {error}") from error
        if offer.name not in os.readlink(f"/proc/self/fd/{self._fd}"):
            self.close()
            raise CanNotShare(f"process {offer.pid} is another one on this host")

    def read(self, layer: int, offset: int, target: memoryview) -> None:
        """Fill `target` from the bytes of a layer that begin at `offset`."""
        if os.preadv(self._fd, [target], self._layers[layer] + offset) != len(target):
            raise OSError(f"the pool ends before byte {offset + len(target)} of layer {layer}")

    def close(self) -> None:
        """Or the memory would outlive its worker."""
        os.close(self._fd)
