"""The process group of CPU ranks on one machine: gloo, whose short collectives run on the calling thread.

    register()
    dist.init_process_group(NAME, ...)        # or dist.new_group(..., backend=NAME)

Gloo hands each collective to a thread, which waits for a third that reads from the network: four threads are woken for
a few hundred bytes, which takes longer than a layer of a small model. A step of decoding consists of such collectives.
Here each rank writes to its peers' Unix sockets and reads from them by itself.

Gloo does whatever else there is: what is called with `async_op`, larger sums, rarer collectives, sends and receives;
and everything, where the ranks are on several machines or the system has no such sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

NAME = "epbackend_cpu"
"""Of the backend, to torch.distributed."""
LARGEST_SUM = 256 << 10
"""Bytes of a tensor that each rank sends whole to each other one. Gloo sends parts of a larger one, which is faster
from 1 MiB (4 ranks) or 4 MiB (2 ranks) on (measured on 2 cores, 2026-11-28)."""
LONGEST_POLL_S = 60.0
"""LMDeploy's groups wait for 97 years, which poll does not."""
_HEADER = struct.Struct("<IQ")
"""Before each message: the collective that it belongs to (its place in `_CALLS`), and the bytes that follow."""
_TEXT_BYTES = 256
"""Of what each rank sends to the others when they connect."""
_CALLS = ("all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all")
_REDUCTIONS: tuple[tuple[Any, Callable[[Tensor], Tensor]], ...] = (
    (dist.ReduceOp.SUM, lambda stacked: stacked.sum(0)),
    (dist.ReduceOp.AVG, lambda stacked: stacked.sum(0) / len(stacked)),
    (dist.ReduceOp.PRODUCT, lambda stacked: stacked.prod(0)),
    (dist.ReduceOp.MAX, lambda stacked: stacked.amax(0)),
    (dist.ReduceOp.MIN, lambda stacked: stacked.amin(0)),
)
_work_of: Any = torch._C._distributed_c10d._create_work_from_future  # type: ignore[attr-defined]
_WRITABLE = 0x200
"""PyBUF_WRITE of CPython's C API."""
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.argtypes, _memory.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object


def register() -> None:
    """Makes the backend known to torch.distributed, once a process."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, connect, devices=["cpu"])


def connect(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A `CpuGroup` where all ranks are on one machine, else gloo: all ranks decide alike. Torch calls it.

    Raises:
        RuntimeError: a rank does not come in time.
    """
    gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)  # whose types lack most of its methods
    gloo._set_sequence_number_for_group()  # as torch does for groups of gloo
    machines = {*_all_gather_text(gloo, _machine())}
    if len(machines) > 1 or not machines.pop():
        log.info("rank %d of %d: gloo joins these ranks, which are not all on one Linux machine", rank, size)
        return gloo
    return CpuGroup(gloo, _linked(gloo, timeout), timeout)


def _machine() -> str:
    """The same for processes that can reach each other's sockets; empty where there are none."""
    boot, spaces = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns")
    if not boot.exists() or not spaces.exists():
        return ""
    network, users = ((spaces / each).readlink() for each in ("net", "user"))  # those of a container
    return f"{boot.read_text().strip()} {network} {users} {os.getuid()}"


def _by_gloo(name: str) -> Callable[..., Any]:
    """The method of gloo's group.

    Torch's base class would call it too, but for a group written in Python it holds the GIL meanwhile. Gloo's threads
    need that to free tensors: a deadlock.
    """

    def call(group: CpuGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(group._gloo, name)(*args, **kwargs)

    return call


_ProcessGroup: Any = dist.ProcessGroup  # whose types list every form of C++; Python calls one of each


class CpuGroup(_ProcessGroup):
    """One rank's end of the group.

    The methods are torch's, and so are their arguments; all ranks call the same ones in the same order. What is done
    here has ended when they return.

    Raises:
        RuntimeError: from them: a collective takes longer than its timeout, a rank is gone, or ranks called different
            collectives. The group is of no use then.
    """

    def __init__(self, gloo: Any, links: dict[int, socket.socket], timeout: timedelta) -> None:
        """`gloo`: a dist.ProcessGroupGloo of the same ranks; `links`: a connection to each other rank."""
        super().__init__(gloo.rank(), gloo.size())
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self.timeout = timeout
        """Of collectives that bring none of their own."""
        self._gloo, self._rank, self._size = gloo, gloo.rank(), gloo.size()
        self._links = links
        self._lock = threading.RLock()  # a signal's handler may close the group
        self._broken = ""
        for link in links.values():
            link.setblocking(False)

    def getBackendName(self) -> str:
        return NAME

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self._gloo._set_default_timeout(timeout)

    def shutdown(self) -> None:
        self._close("the process group was destroyed")
        self._gloo.shutdown()

    def abort(self) -> None:
        self._close("the process group was aborted")
        self._gloo.abort()

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        reduce = _reduction(opts)
        if reduce is None or not _runs_here(opts, tensors) or tensors[0].nbytes > LARGEST_SUM:
            return self._gloo.allreduce(tensors, opts)
        mine = _dense(tensors[0])
        stacked = self._stacked(mine)
        self._exchange("all_reduce", opts, dict.fromkeys(self._links, mine), self._by_peer(stacked))
        return _done(tensors, [reduce(stacked)])

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        if not _runs_here(opts, tensors):
            return self._gloo.broadcast(tensors, opts)
        values = _dense(tensors[0])
        if opts.rootRank == self._rank:
            self._exchange("broadcast", opts, dict.fromkeys(self._links, values), {})
        else:
            self._exchange("broadcast", opts, {}, {opts.rootRank: values})
        return _done(tensors, [values])

    def all_gather_single(self, whole: Tensor, part: Tensor, opts: Any) -> Any:
        if not _runs_here(opts, [whole, part]):
            return self._gloo._allgather_base(whole, part, opts)
        values = _dense(whole)
        self._gather(values.view(self._size, -1), part, opts)
        return _done([whole], [values])

    def allgather(self, wholes: list[list[Tensor]], parts: list[Tensor], opts: Any) -> Any:
        if not _runs_here(opts, [*wholes[0], *parts]):
            return self._gloo.allgather(wholes, parts, opts)
        values_R = [_dense(each) for each in wholes[0]]
        self._gather(values_R, parts[0], opts)
        return _done(wholes[0], values_R)

    def reduce_scatter_single(self, part: Tensor, whole: Tensor, opts: Any) -> Any:
        reduce = _reduction(opts)
        if reduce is None or not _runs_here(opts, [part, whole]) or part.nbytes > LARGEST_SUM:
            return self._gloo._reduce_scatter_base(part, whole, opts)
        return self._reduce_scatter(reduce, part, _dense(whole).view(self._size, *part.shape), opts)

    def reduce_scatter(self, parts: list[Tensor], wholes: list[list[Tensor]], opts: Any) -> Any:
        reduce = _reduction(opts)
        if reduce is None or not _runs_here(opts, [*parts, *wholes[0]]) or parts[0].nbytes > LARGEST_SUM:
            return self._gloo.reduce_scatter(parts, wholes, opts)
        return self._reduce_scatter(reduce, parts[0], wholes[0], opts)

    def all_to_all_single(
        self, received: Tensor, sent: Tensor, receive_R: list[int], send_R: list[int], opts: Any
    ) -> Any:
        if not _runs_here(opts, [received, sent]):
            return self._gloo.alltoall_base(received, sent, receive_R, send_R, opts)
        values, given = _dense(received), _dense(sent)
        targets_R = values.split(receive_R) if receive_R else values.tensor_split(self._size)
        sources_R = given.split(send_R) if send_R else given.tensor_split(self._size)
        _put(sources_R[self._rank], targets_R[self._rank])
        self._exchange("all_to_all", opts, self._by_peer(sources_R), self._by_peer(targets_R))
        return _done([received], [values])

    # The names before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def allgather_into_tensor_coalesced(self, wholes: list[Tensor], parts: list[Tensor], opts: Any) -> Any:
        pairs = zip(wholes, parts, strict=True)
        return _Works([self._gloo._allgather_base(whole, part, opts) for whole, part in pairs])

    def reduce_scatter_tensor_coalesced(self, parts: list[Tensor], wholes: list[Tensor], opts: Any) -> Any:
        pairs = zip(parts, wholes, strict=True)
        return _Works([self._gloo._reduce_scatter_base(part, whole, opts) for part, whole in pairs])

    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    allgather_coalesced = _by_gloo("allgather_coalesced")
    allreduce_coalesced = _by_gloo("allreduce_coalesced")
    alltoall = _by_gloo("alltoall")
    barrier = _by_gloo("barrier")
    gather = _by_gloo("gather")
    recv = _by_gloo("recv")
    recv_anysource = _by_gloo("recv_anysource")
    reduce = _by_gloo("reduce")
    scatter = _by_gloo("scatter")
    send = _by_gloo("send")

    def _gather(self, values_R: Sequence[Tensor] | Tensor, part: Tensor, opts: Any) -> None:
        mine = _dense(part)
        _put(mine.view(-1), values_R[self._rank].view(-1))
        self._exchange("all_gather", opts, dict.fromkeys(self._links, mine), self._by_peer(values_R))

    def _reduce_scatter(
        self, reduce: Callable[[Tensor], Tensor], part: Tensor, whole_R: Sequence[Tensor] | Tensor, opts: Any
    ) -> Any:
        sent_R = [_dense(each) for each in whole_R]
        stacked = self._stacked(sent_R[self._rank])
        self._exchange("reduce_scatter", opts, self._by_peer(sent_R), self._by_peer(stacked))
        return _done([part], [reduce(stacked)])

    def _stacked(self, mine: Tensor) -> Tensor:
        """Room for a tensor of each rank, where this rank's is there already."""
        stacked = mine.new_empty(self._size, *mine.shape)
        stacked[self._rank] = mine
        return stacked

    def _by_peer(self, values_R: Sequence[Tensor] | Tensor) -> dict[int, Tensor]:
        return {peer: values_R[peer] for peer in self._links}

    def _exchange(self, call: str, opts: Any, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        """Send and receive contiguous tensors, by peer, until all are through."""
        timeout = opts.timeout if opts.timeout > timedelta(0) else self.timeout
        deadline = time.monotonic() + timeout.total_seconds()
        with self._lock, self._closed_by_a_failure():
            under_way = [
                *(_Transfer(self._links[peer], peer, call, sent[peer], receives=False) for peer in sent),
                *(
                    _Transfer(self._links[peer], peer, call, received[peer], receives=True)
                    for peer in received
                ),
            ]
            while under_way := [each for each in under_way if not each.ends()]:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    late = sorted({each.peer for each in under_way})
                    raise TimeoutError(
                        f"timed out after {timeout.total_seconds():g} s, waiting for ranks {late}"
                    )
                _sleep(under_way, min(left_s, LONGEST_POLL_S))

    @contextlib.contextmanager
    def _closed_by_a_failure(self) -> Iterator[None]:
        """A collective that ends half-way cannot be resumed: the links are closed, and the other ranks fail too."""
        if self._broken:
            raise RuntimeError(self._broken)
        try:
            yield
        except BaseException as error:
            told = isinstance(error, OSError)
            self._stop(f"rank {self._rank} of {self._size} CPU ranks: {error if told else 'interrupted'}")
            for link in self._links.values():
                link.close()
            if told:
                raise RuntimeError(self._broken) from error
            raise

    def _close(self, reason: str) -> None:
        self._stop(reason)
        with self._lock:  # whoever waits in a collective has been woken
            for link in self._links.values():
                link.close()

    def _stop(self, reason: str) -> None:
        """Wakes whoever waits, on this rank and on the others."""
        self._broken = self._broken or reason
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)


class _Works(dist.Work):
    """Several of gloo's, as one."""

    def __init__(self, works: list[Any]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return all(work.wait(timeout) for work in self._works)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class _Transfer:
    """A tensor on its way to or from one other rank, behind a header that says what it is."""

    def __init__(self, link: socket.socket, peer: int, call: str, tensor: Tensor, *, receives: bool) -> None:
        self.link, self.peer, self.receives = link, peer, receives
        self._expected = _HEADER.pack(_CALLS.index(call), tensor.nbytes)
        self._header = bytearray(self._expected)
        self._views = [memoryview(self._header)]
        if tensor.nbytes:
            self._views.append(_memory(tensor.data_ptr(), tensor.nbytes, _WRITABLE))

    def ends(self) -> bool:
        """Moves what goes through at once; whether that was the last.

        Raises:
            OSError: the rank is gone, or called another collective.
        """
        while self._views:
            try:
                if self.receives:
                    count = self.link.recvmsg_into(self._views)[0]
                else:
                    count = self.link.sendmsg(self._views, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError as error:
                raise OSError(f"connection closed by rank {self.peer} ({error.strerror})") from error
            if not count:
                raise OSError(f"connection closed by rank {self.peer}")
            while self._views and count >= len(self._views[0]):
                count -= len(self._views.pop(0))
            if count:
                self._views[0] = self._views[0][count:]
            if len(self._views) < 2 and self._header != self._expected:
                sent, expected = _in_words(self._header), _in_words(self._expected)
                raise OSError(f"rank {self.peer} sent {sent}; expected was {expected}")
        return True


def _sleep(under_way: list[_Transfer], seconds: float) -> None:
    """Until one of them can go on."""
    events: dict[socket.socket, int] = {}
    for each in under_way:
        events[each.link] = events.get(each.link, 0) | (select.POLLIN if each.receives else select.POLLOUT)
    poller = select.poll()
    for link, wanted in events.items():
        poller.register(link, wanted)
    poller.poll(seconds * 1000)


def _in_words(header: bytes | bytearray) -> str:
    place, size = _HEADER.unpack(header)
    return f"{_CALLS[place] if place < len(_CALLS) else 'no collective'}, {size} bytes"


def _runs_here(opts: Any, tensors: list[Tensor]) -> bool:
    """Whether the call is synchronous and its tensors are plain CPU memory. All ranks answer alike."""
    plain = all(each.is_cpu and each.layout == torch.strided for each in tensors)
    return plain and not getattr(opts, "asyncOp", True)


def _reduction(opts: Any) -> Callable[[Tensor], Tensor] | None:
    """Of tensors that are stacked; None for one that gloo alone has."""
    return next((reduce for known, reduce in _REDUCTIONS if opts.reduceOp == known), None)


def _dense(tensor: Tensor) -> Tensor:
    """Its values in one piece: the tensor itself, or a copy if it has gaps."""
    return tensor.detach().contiguous()


def _put(value: Tensor, target: Tensor) -> None:
    if target.data_ptr() != value.data_ptr():
        with torch.inference_mode():  # as gloo may, whatever mode the tensor was made in
            target.detach().copy_(value)


def _done(targets: list[Tensor], values: list[Tensor]) -> Any:
    """The work that has ended, after the values have been put into the targets."""
    for target, value in zip(targets, values, strict=True):
        _put(value, target)
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(targets)
    return _work_of(future)


def _all_gather_text(gloo: Any, mine: str) -> list[str]:
    """The text of each rank, of at most _TEXT_BYTES."""
    whole = torch.empty(gloo.size() * _TEXT_BYTES, dtype=torch.uint8, device="cpu")
    gloo._allgather_base(
        whole, torch.tensor([*mine.encode().ljust(_TEXT_BYTES)], dtype=torch.uint8, device="cpu")
    ).wait()
    return [bytes(each.tolist()).decode().rstrip() for each in whole.split(_TEXT_BYTES)]


def _linked(gloo: Any, timeout: timedelta) -> dict[int, socket.socket]:
    """A connection to each other rank: it is made here to lower ones, and awaited from higher ones.

    Raises:
        RuntimeError: a rank is gone.
    """
    rank, size, deadline = gloo.rank(), gloo.size(), time.monotonic() + timeout.total_seconds()
    links: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as undone:
        mine = uuid.uuid4().hex
        listener.bind(_abstract(mine))
        listener.listen(size)
        names = _all_gather_text(gloo, mine)
        awaited = {_abstract(f"{names[peer]} to {rank}"): peer for peer in range(rank + 1, size)}
        try:
            for peer in range(rank):
                link = undone.enter_context(socket.socket(socket.AF_UNIX))
                link.bind(_abstract(f"{mine} to {peer}"))
                link.connect(_abstract(names[peer]))
                links[peer] = link
            while len(links) < size - 1:
                left_s = min(max(deadline - time.monotonic(), 0.001), threading.TIMEOUT_MAX)
                listener.settimeout(left_s)
                link, name = listener.accept()
                undone.enter_context(link)
                # Such a name is open to every user of the machine.
                if name in awaited and _user_of(link) == os.getuid():
                    links[awaited.pop(name)] = link
                else:
                    link.close()
        except OSError as error:
            missing = sorted({*range(size)} - {rank, *links})
            raise RuntimeError(
                f"rank {rank} of {size} CPU ranks: no connection to ranks {missing}: {error}"
            ) from error
        undone.pop_all()
    return links


def _abstract(name: str) -> bytes:
    """The address of a socket; no file that could be left."""
    return f"\0epbackend {name}".encode()


def _user_of(link: socket.socket) -> int:
    """The user id of the process at the other end."""
    credentials = struct.Struct("3i")  # struct ucred: process, user, group
    given = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    _, user, _ = credentials.unpack(given)
    return user
