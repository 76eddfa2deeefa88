"""The process group of CPU ranks on one machine: collectives on the calling thread, over Unix sockets.

    register()
    dist.init_process_group(NAME, ...)        # or dist.new_group(..., backend=NAME)

Gloo hands each collective to a thread, which waits for a third that reads from the network: four threads are woken for
a few hundred bytes, which takes longer than a layer of a small model. Here each rank writes to its peers' sockets and
reads from them by itself. What does not go through at once goes on whenever this process waits in any such group.

Ranks on several machines, and systems that have no such sockets, are joined by gloo as before.
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
import weakref
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

NAME = "epbackend_cpu"
"""Of the backend, to torch.distributed."""
LONGEST_POLL_S = 60.0
"""LMDeploy's groups wait for 97 years, which poll does not."""
_HEADER = struct.Struct("<IIQ")
"""Before each message: what it belongs to (its place in `_CALLS`), the tag of a send, and the bytes that follow."""
_RANK = struct.Struct("<I")
_CALLS = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "gather",
    "scatter",
    "reduce_scatter",
    "all_to_all",
    "barrier",
    "send",
)
_WHOLE_BYTES = 64 << 10
"""Larger tensors are reduced in parts, one by each rank, and gathered again: each rank then sends its tensor twice,
and not once to each other rank."""
_BLOCK_BYTES = 4 << 20
"""So much of a large tensor is reduced at once: what it takes stays in the caches, and a link holds it on its way."""
_REDUCTIONS: tuple[tuple[Any, Callable[[Tensor], Tensor]], ...] = (
    (dist.ReduceOp.SUM, lambda stacked: stacked.sum(0)),
    (dist.ReduceOp.AVG, lambda stacked: stacked.sum(0) / len(stacked)),
    (dist.ReduceOp.PRODUCT, lambda stacked: stacked.prod(0)),
    (dist.ReduceOp.MAX, lambda stacked: stacked.amax(0)),
    (dist.ReduceOp.MIN, lambda stacked: stacked.amin(0)),
)
_WRITABLE = 0x200
"""PyBUF_WRITE of CPython's C API."""
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.argtypes, _memory.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_groups: weakref.WeakSet[CpuGroup] = weakref.WeakSet()
"""All of this process: who waits in one of them moves the bytes of all."""
_groups_lock = threading.Lock()


def register() -> None:
    """Makes the backend known to torch.distributed, once a process."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, connect, devices=["cpu"])


def connect(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A `CpuGroup` where all ranks are on one machine, else gloo: all ranks decide alike. Torch calls it."""
    store.set(f"machine/{rank}", _machine())
    machines = {store.get(f"machine/{each}") for each in range(size)}
    if len(machines) > 1 or not machines.pop():
        log.info("rank %d of %d: gloo joins these ranks, which are not all on one Linux machine", rank, size)
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    return CpuGroup(store, rank, size, timeout)


def _machine() -> str:
    """The same for processes that can reach each other's sockets; empty where there are none."""
    boot, spaces = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns")
    if not boot.exists() or not spaces.exists():
        return ""
    network, users = ((spaces / each).readlink() for each in ("net", "user"))  # those of a container
    return f"{boot.read_text().strip()} {network} {users} {os.getuid()}"


_ProcessGroup: Any = dist.ProcessGroup  # whose types list every form of C++; Python calls one of each


class CpuGroup(_ProcessGroup):
    """One rank's end of the group.

    The methods are torch's, and so are their arguments; all ranks call the same ones in the same order. They return as
    soon as the collective has begun, and what they return is waited for, except for a sum of more than 64 KiB, which
    has ended then.

    Raises:
        RuntimeError: from them, or from the wait: a collective takes longer than its timeout, a rank is gone, or ranks
            called different collectives. The group is of no use then.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.timeout = timeout
        """Of collectives that bring none of their own."""
        self._rank, self._size = rank, size
        self._links = _connected(store, rank, size, timeout)
        self._lock = threading.RLock()
        self._broken = ""
        with _groups_lock:
            _groups.add(self)

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name  # torch's own keeps it in C++ backends, of which this group has none

    def shutdown(self) -> None:
        self._close("the process group was destroyed")

    abort = shutdown

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        (tensor,) = tensors
        flat = tensor.detach().reshape(-1)
        if flat.nbytes <= _WHOLE_BYTES:
            stacked, reduce = self._gathered(flat), _reduction(opts)
            return self._start(
                "all_reduce",
                opts,
                dict.fromkeys(self._links, flat),
                {peer: stacked[peer] for peer in self._links},
                lambda: _deliver(reduce(stacked), tensor),
            )
        for block in flat.split(_BLOCK_BYTES // flat.itemsize):
            parts = block.tensor_split(self._size)
            self.reduce_scatter([parts[self._rank]], [list(parts)], opts).wait()
            work = self._start(
                "all_gather",
                opts,
                dict.fromkeys(self._links, parts[self._rank]),
                {peer: parts[peer] for peer in self._links},
            )
            work.wait()
        _deliver(flat, tensor)
        return work

    def reduce(self, tensors: list[Tensor], opts: Any) -> Any:
        (tensor,) = tensors
        flat = tensor.detach().reshape(-1)
        if opts.rootRank != self._rank:
            return self._start("reduce", opts, {opts.rootRank: flat}, {})
        stacked, reduce = self._gathered(flat), _reduction(opts)
        return self._start(
            "reduce",
            opts,
            {},
            {peer: stacked[peer] for peer in self._links},
            lambda: _deliver(reduce(stacked), tensor),
        )

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        (tensor,) = tensors
        if opts.rootRank == self._rank:
            return self._start("broadcast", opts, dict.fromkeys(self._links, _dense(tensor)), {})
        return self._receive("broadcast", opts, {}, {opts.rootRank: tensor})

    def all_gather_single(self, whole: Tensor, part: Tensor, opts: Any = None) -> Any:
        received, mine = _room(whole), _dense(part)
        parts = received.view(self._size, -1)
        parts[self._rank] = mine.view(-1)
        return self._start(
            "all_gather",
            opts,
            dict.fromkeys(self._links, mine),
            {peer: parts[peer] for peer in self._links},
            lambda: _deliver(received, whole),
        )

    def allgather(self, wholes: list[list[Tensor]], parts: list[Tensor], opts: Any = None) -> Any:
        (whole,), (part,) = wholes, parts
        whole[self._rank].copy_(part)
        mine = dict.fromkeys(self._links, _dense(part))
        return self._receive("all_gather", opts, mine, {peer: whole[peer] for peer in self._links})

    def gather(self, wholes: list[list[Tensor]], parts: list[Tensor], opts: Any) -> Any:
        (part,) = parts
        if opts.rootRank != self._rank:
            return self._start("gather", opts, {opts.rootRank: _dense(part)}, {})
        (whole,) = wholes
        whole[self._rank].copy_(part)
        return self._receive("gather", opts, {}, {peer: whole[peer] for peer in self._links})

    def scatter(self, parts: list[Tensor], wholes: list[list[Tensor]], opts: Any) -> Any:
        (part,) = parts
        if opts.rootRank != self._rank:
            return self._receive("scatter", opts, {}, {opts.rootRank: part})
        (whole,) = wholes
        part.copy_(whole[self._rank])
        return self._start("scatter", opts, {peer: _dense(whole[peer]) for peer in self._links}, {})

    def reduce_scatter_single(self, part: Tensor, whole: Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter([part], [list(whole.detach().reshape(self._size, -1))], opts)

    def reduce_scatter(self, parts: list[Tensor], wholes: list[list[Tensor]], opts: Any = None) -> Any:
        (part,), (whole,) = parts, wholes
        stacked, reduce = self._gathered(whole[self._rank].detach().reshape(-1)), _reduction(opts)
        return self._start(
            "reduce_scatter",
            opts,
            {peer: _dense(whole[peer]) for peer in self._links},
            {peer: stacked[peer] for peer in self._links},
            lambda: _deliver(reduce(stacked), part),
        )

    def all_to_all_single(
        self, received: Tensor, sent: Tensor, receive_R: list[int], send_R: list[int], opts: Any = None
    ) -> Any:
        room, dense = _room(received), _dense(sent)
        targets = room.split(receive_R) if receive_R else room.tensor_split(self._size)
        sources = dense.split(send_R) if send_R else dense.tensor_split(self._size)
        targets[self._rank].copy_(sources[self._rank])
        return self._start(
            "all_to_all",
            opts,
            {peer: sources[peer] for peer in self._links},
            {peer: targets[peer] for peer in self._links},
            lambda: _deliver(room, received),
        )

    def alltoall(self, received: list[Tensor], sent: list[Tensor], opts: Any = None) -> Any:
        received[self._rank].copy_(sent[self._rank])
        sources = {peer: _dense(sent[peer]) for peer in self._links}
        return self._receive("all_to_all", opts, sources, {peer: received[peer] for peer in self._links})

    def barrier(self, opts: Any = None) -> Any:
        everybody = dict.fromkeys(self._links, torch.empty(0))
        return self._start("barrier", opts, everybody, everybody)

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Any:
        (tensor,) = tensors
        return self._start("send", None, {peer: _dense(tensor)}, {}, tag=tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Any:
        (tensor,) = tensors
        return self._receive("send", None, {}, {peer: tensor}, tag=tag)

    # The names before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def _gathered(self, mine: Tensor) -> Tensor:
        """Room for a flat tensor of each rank, where this rank's is there already."""
        stacked = mine.new_empty(self._size, len(mine))
        stacked[self._rank] = mine
        return stacked

    def _receive(
        self, call: str, opts: Any, sent: dict[int, Tensor], targets: dict[int, Tensor], tag: int = 0
    ) -> Any:
        """`_start`, where the tensors that are received may have gaps."""
        received = {peer: _room(target) for peer, target in targets.items()}

        def finish() -> None:
            for peer, target in targets.items():
                _deliver(received[peer], target)

        return self._start(call, opts, sent, received, finish, tag)

    def _start(
        self,
        call: str,
        opts: Any,
        sent: dict[int, Tensor],
        received: dict[int, Tensor],
        finish: Callable[[], None] = lambda: None,
        tag: int = 0,
    ) -> Any:
        """Begin to send and to receive contiguous tensors, by peer; the wait calls `finish` when all are through."""
        given = getattr(opts, "timeout", timedelta(0))
        timeout = given if given > timedelta(0) else self.timeout
        with self._lock:
            self._check()
            work = _Work(self, timeout, len(sent) + len(received), finish)
            for peer, tensor in received.items():
                self._links[peer].incoming.append(_Message(call, tag, tensor, work))
            try:
                for peer, tensor in sent.items():
                    self._links[peer].outgoing.append(_Message(call, tag, tensor, work))
                    self._links[peer].send()
            except OSError as error:
                self._break(str(error))
        return work

    def wait_for(self, work: _Work) -> None:
        """Until it is done; the bytes of all groups move meanwhile."""
        deadline = time.monotonic() + work.timeout.total_seconds()
        with self._lock:
            while work.messages:
                self._check()
                if not self._move() and work.messages:
                    self._sleep(work, deadline)

    def advance(self) -> None:
        """Move what can be moved at once, unless another thread is about to."""
        if self._lock.acquire(blocking=False):
            with contextlib.suppress(RuntimeError):  # which whoever calls or waits gets to know
                self._move()
            self._lock.release()

    def _move(self) -> bool:
        """Whether anything could be sent or received at once."""
        moved = False
        try:
            for link in self._links.values():
                moved |= link.send() | link.receive()
        except OSError as error:
            self._break(str(error))
        return moved

    def _sleep(self, work: _Work, deadline: float) -> None:
        """Until something can be sent or received in any group of this process."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            late = [peer for peer, link in sorted(self._links.items()) if link.concerns(work)]
            self._break(f"timed out after {work.timeout.total_seconds():g} s, waiting for ranks {late}")
        with _groups_lock:
            groups, poller = list(_groups), select.poll()
        for group in groups:
            for link in group._links.values():
                if events := link.awaited():
                    poller.register(link.socket, events)
        poller.poll(min(left_s, LONGEST_POLL_S) * 1000)
        for group in groups:
            if group is not self:
                group.advance()

    @property
    def broken(self) -> bool:
        return bool(self._broken)

    def _check(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)

    def _break(self, reason: str) -> NoReturn:
        self._close(f"rank {self._rank} of {self._size} CPU ranks: {reason}")
        raise RuntimeError(self._broken)

    def _close(self, reason: str) -> None:
        """For good: the other ranks find their links closed, and wait no longer."""
        self._broken = self._broken or reason
        for link in self._links.values():
            link.close()


class _Work(dist.Work):
    """A collective under way. Its tensors are filled by the thread that waits for it, or looks, after all has come."""

    def __init__(
        self, group: CpuGroup, timeout: timedelta, messages: int, finish: Callable[[], None]
    ) -> None:
        super().__init__()
        self._group, self._finish = group, finish
        self.timeout = timeout
        self.messages = messages
        """Not yet through."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self.messages:
            self._group.wait_for(self)
        self._finish()
        self._finish = lambda: None  # lets go of the tensors
        return True

    def is_completed(self) -> bool:
        """Whether `wait` returns, or fails, at once."""
        if self.messages:
            self._group.advance()
        return self._group.broken or (not self.messages and self.wait())


class _Message:
    """A tensor on its way, behind a header that says what it is."""

    __slots__ = ("expected", "header", "left", "tensor", "views", "work")

    def __init__(self, call: str, tag: int, tensor: Tensor, work: _Work) -> None:
        self.expected = _HEADER.pack(_CALLS.index(call), tag, tensor.nbytes)
        self.header = bytearray(self.expected)
        self.views = [memoryview(self.header)]
        if tensor.nbytes:
            self.views.append(_memory(tensor.data_ptr(), tensor.nbytes, _WRITABLE))
        self.left = len(self.header) + tensor.nbytes
        self.tensor, self.work = tensor, work

    def skip(self, count: int) -> None:
        """So many bytes are through."""
        self.left -= count
        while self.views and count >= len(self.views[0]):
            count -= len(self.views.pop(0))
        if count:
            self.views[0] = self.views[0][count:]


class _Link:
    """The connection to one other rank, and what waits to go through it, in the order of the calls."""

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer, self.socket = peer, connection
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BLOCK_BYTES)  # at most the system's limit
        self.outgoing: deque[_Message] = deque()
        self.incoming: deque[_Message] = deque()

    def close(self) -> None:
        self.socket.close()
        self.outgoing.clear()
        self.incoming.clear()

    def concerns(self, work: _Work) -> bool:
        return any(message.work is work for message in (*self.incoming, *self.outgoing))

    def awaited(self) -> int:
        """What there is to wait for, as poll's events."""
        return (select.POLLIN if self.incoming else 0) | (select.POLLOUT if self.outgoing else 0)

    def send(self) -> bool:
        """What goes through at once; False where nothing does.

        Raises:
            OSError: the rank is gone.
        """
        return self._move(self.outgoing, lambda views: self.socket.sendmsg(views, (), socket.MSG_NOSIGNAL))

    def receive(self) -> bool:
        """What has come; False where nothing has.

        Raises:
            OSError: the rank is gone, or called another collective.
        """
        return self._move(self.incoming, lambda views: self.socket.recvmsg_into(views)[0])

    def _move(self, messages: deque[_Message], move: Callable[[list[memoryview]], int]) -> bool:
        moved = False
        while messages:
            message = messages[0]
            try:
                count = move(message.views)
            except BlockingIOError:
                break
            except OSError as error:
                raise OSError(f"connection closed by rank {self.peer} ({error.strerror})") from error
            if not count:
                raise OSError(f"connection closed by rank {self.peer}")
            moved = True
            message.skip(count)
            if len(message.views) < 2 and message.header != message.expected:
                sent, expected = _in_words(bytes(message.header)), _in_words(message.expected)
                raise OSError(f"rank {self.peer} sent {sent}; expected was {expected}")
            if not message.left:
                messages.popleft()
                message.work.messages -= 1
        return moved


def _in_words(header: bytes) -> str:
    place, tag, size = _HEADER.unpack(header)
    name = _CALLS[place] if place < len(_CALLS) else "no collective"
    return f"{name}, {size} bytes" + (f" (tag {tag})" if tag else "")


def _reduction(opts: Any) -> Callable[[Tensor], Tensor]:
    wanted = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    for known, reduce in _REDUCTIONS:
        if wanted == known:
            return reduce
    raise RuntimeError(f"CPU ranks cannot reduce by {wanted}")


def _dense(tensor: Tensor) -> Tensor:
    """Its values in one piece, as they are sent."""
    return tensor.detach().contiguous()


def _room(target: Tensor) -> Tensor:
    """Where its values can be received in one piece: the tensor itself, if it has no gaps."""
    return target.detach() if target.is_contiguous() else target.new_empty(target.shape)


def _deliver(received: Tensor, target: Tensor) -> None:
    if received.data_ptr() != target.data_ptr():
        target.detach().copy_(received.view(target.shape))


def _connected(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dict[int, _Link]:
    """A link to each other rank: it is made here to lower ones, and awaited from higher ones."""
    links: dict[int, _Link] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        address = f"epbackend-{uuid.uuid4().hex}"
        listener.bind(f"\0{address}")  # an abstract name: no file that could be left
        listener.listen(size)
        store.set(f"address/{rank}", address)
        for peer in range(rank):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(f"\0{store.get(f'address/{peer}').decode()}")
            connection.sendall(_RANK.pack(rank))
            links[peer] = _Link(peer, connection)
        listener.settimeout(min(timeout.total_seconds(), threading.TIMEOUT_MAX))
        while len(links) < size - 1:
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                missing = sorted(set(range(size)) - {rank, *links})
                raise RuntimeError(
                    f"rank {rank} of {size} CPU ranks: ranks {missing} did not come"
                ) from error
            if _user_of(connection) != os.getuid():  # such a name is open to every user of the machine
                connection.close()
                continue
            (peer,) = _RANK.unpack(connection.recv(_RANK.size, socket.MSG_WAITALL))
            links[peer] = _Link(peer, connection)
    return links


def _user_of(connection: socket.socket) -> int:
    """The user id of the process at the other end."""
    credentials = struct.Struct("3i")  # struct ucred: process, user, group
    given = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    _, user, _ = credentials.unpack(given)
    return user
