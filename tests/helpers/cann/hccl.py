"""HCCL as the fused operators use it: through the communicator that a call names."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p

import torch
from torch import Tensor

from tests.helpers.cann.registry import require

INT64, UINT8 = 5, 7
"""HcclDataType."""


class Communicator:
    """The communicator of that name, whose rank and size must be as the call says."""

    @staticmethod
    def alive(name: str) -> bool:
        """Whether there is a communicator of that name."""
        return bool(_library().emulation_communicator(name.encode()))

    def __init__(self, name: str, size: int, rank: int) -> None:
        self._hccl = _library()
        self._hccl.emulation_buffer_mb.argtypes = [c_void_p]
        handle = self._hccl.emulation_communicator(name.encode())
        require(bool(handle), f"no communicator is called {name!r}")
        self._handle = c_void_p(handle)
        found_size, found_rank = c_uint32(), c_uint32()
        self._hccl.HcclGetRankSize(self._handle, byref(found_size))
        self._hccl.HcclGetRankId(self._handle, byref(found_rank))
        found = found_rank.value, found_size.value
        require(
            found == (rank, size), f"{name} is rank {found[0]} of {found[1]}, the call says {rank} of {size}"
        )
        self.size, self.rank = size, rank

    @property
    def buffer_mb(self) -> int:
        return self._hccl.emulation_buffer_mb(self._handle)

    def all_gather(self, values: list[int]) -> list[list[int]]:
        """The values of each rank."""
        mine = torch.tensor(values, dtype=torch.int64)
        whole = torch.empty(self.size, len(values), dtype=torch.int64)
        gather = self._hccl.HcclAllGather
        gather.argtypes = [c_void_p, c_void_p, c_uint64, c_int, c_void_p, c_void_p]
        done = gather(mine.data_ptr(), whole.data_ptr(), len(values), INT64, self._handle, None)
        require(done == 0, "the ranks are in different collectives")
        return whole.tolist()

    def exchange(self, bytes_SB: Tensor, send_R: list[int]) -> list[Tensor]:
        """Send `send_R[r]` of the rows (uint8, sorted by rank) to each rank r; what each rank sent here."""
        width = bytes_SB.shape[1]
        receive_R = [sent_R[self.rank] for sent_R in self.all_gather(send_R)]
        received = torch.empty(sum(receive_R), width, dtype=torch.uint8)
        bytes_SB = bytes_SB.contiguous()
        exchange = self._hccl.HcclAlltoAllV
        counts = POINTER(c_uint64)
        exchange.argtypes = [
            *(c_void_p, counts, counts, c_int),
            *(c_void_p, counts, counts, c_int),
            *(c_void_p, c_void_p),
        ]
        done = exchange(
            *(bytes_SB.data_ptr(), *_counts_and_offsets(send_R, width), UINT8),
            *(received.data_ptr(), *_counts_and_offsets(receive_R, width), UINT8),
            *(self._handle, None),
        )
        require(done == 0, "the ranks disagree about what they send each other")
        return list(received.split(receive_R))


def _library() -> ctypes.CDLL:
    hccl = ctypes.CDLL("libhccl.so")
    hccl.emulation_communicator.restype = c_void_p
    hccl.emulation_communicator.argtypes = [c_char_p]
    return hccl


def _counts_and_offsets(rows_R: list[int], width: int) -> tuple[ctypes.Array, ctypes.Array]:
    counts = [rows * width for rows in rows_R]
    offsets = [sum(counts[:rank]) for rank in range(len(counts))]
    array = c_uint64 * len(counts)
    return array(*counts), array(*offsets)
