"""C workers that carry packets by an image, before anything else of a daemon is there.

The same C loops as engine.py's, with the FIB and the values its workers had. What the rest of a
daemon is needed for is left out: taps, the flight recorder, measuring paths, messages between
nodes. Every rule of packets, every drop and every counter is the loops' own.

On the way of a start to its first packet: no numpy, no asyncio, no logging.
"""

from __future__ import annotations

import _thread
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from tundp.engine.image import Image, Unfit
from tundp.engine.native.library import ABI, require

LOOPS: Final = {"gso": "tundp_batch", "mmsg": "tundp_batch", "simple": "tundp_simple"}
"""Each engine's loop in the extension: `_run`, and `_len` for its memory."""
ARRAYS: Final = {
    "table": "uint32_t",
    "hops": "struct tundp_hop",
    "peers": "uint32_t",
    "peer_hops": "uint32_t",
    "own": "uint32_t",
    "broadcasts": "uint32_t",
}
"""Sections of an image that are a FIB's arrays, and their items."""
FIB: Final = "fib"
WORKERS: Final = "workers"
"""Sections: a struct tundp_fib, and a struct tundp_worker_config for each worker. Pointers and
descriptors in them are void."""
_CONFIG: Final = "struct tundp_worker_config"
_HUGE: Final = 2 << 20


def sizes() -> dict[str, int]:
    """What both sides of an image must agree on, by name: bytes, and the ABI's number."""
    native = require()
    structs = (_CONFIG, "struct tundp_fib", "struct tundp_hop")
    return {"abi": ABI, **{name: int(native.ffi.sizeof(name)) for name in structs}}


class EarlyWorkers:
    """Workers made of an image, and their threads. Its descriptors are its own.

    tun_fds, udp_fds: by queue; duplicated, so that whoever closes them ends nothing here.
    """

    def __init__(self, image: Image, tun_fds: Sequence[int], udp_fds: Sequence[int]) -> None:
        """Unfit, PlatformError or OSError: nothing is left open."""
        native = require()
        self._ffi, self._lib = native.ffi, native.lib
        self.generation = image.generation
        self._fds: list[int] = []
        self._workers: list[_Worker] = []
        self._fib = self._make_fib(image)
        buckets = self._lib.TUNDP_ICMP_LOCAL_BUCKETS + self._lib.TUNDP_ICMP_WIRE_BUCKETS
        self._budget = self._ffi.new("uint64_t[]", buckets)
        try:
            for number, about in enumerate(image.about[WORKERS]):
                queue = about["queue"]
                values = {
                    "tun_fd": self._own(os.dup(tun_fds[queue])),
                    "udp_fd": self._own(os.dup(udp_fds[queue])),
                    "control_fd": self._own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)),
                    "icmp_full_at_ns": self._budget,
                }
                config = self._config(image, number, values)
                self._workers.append(
                    _Worker(image.about["engine"], config, self._fib, about["cpu"])
                )
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Begin to carry packets. RuntimeError if no thread can be started: none runs then."""
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self.stop()
            raise

    def renew(self) -> None:
        """Carry on with new threads, which have the rights the calling one has by now.

        Capabilities, Landlock and seccomp are each thread's own: the threads of before end here.
        """
        if self.is_running:
            self.stop()
            self.start()

    def stop(self) -> None:
        """Wait for the threads, which end after a burst of packets at most. Repeatable."""
        for worker in self._workers:
            worker.ask_to_stop()
        for worker in self._workers:
            worker.join()

    def close(self) -> None:
        """Stop, and close the descriptors. Counters can be read on."""
        self.stop()
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    @property
    def is_running(self) -> bool:
        """Whether it carries packets, or would if its device were there."""
        return any(worker.has_thread for worker in self._workers)

    @property
    def threads(self) -> tuple[int, ...]:
        """Ids of the threads there are (gettid(2))."""
        return tuple(worker.thread for worker in self._workers if worker.has_thread)

    @property
    def error(self) -> str:
        """Why a thread ended by itself; empty if none did."""
        codes = [worker.code for worker in self._workers if worker.code]
        return os.strerror(codes[0]) if codes else ""

    @property
    def hops(self) -> Any:
        """The endpoints by hop id: struct tundp_hop[], valid as long as this object."""
        return self._arrays["hops"]

    @property
    def hop_count(self) -> int:
        """Hop ids are below."""
        return int(self._fib.hop_count)

    def counted(self) -> list[tuple[Any, Any, Any]]:
        """Of each worker: struct tundp_counters, and by hop id hop counters and hop queues."""
        found = []
        for worker in self._workers:
            counters = self._ffi.new("struct tundp_counters *")
            self._lib.tundp_worker_counters(worker.struct, counters)
            found.append((counters, worker.hop_counters, worker.hop_queues))
        return found

    def _own(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _make_fib(self, image: Image) -> Any:
        ffi = self._ffi
        fib = ffi.new("struct tundp_fib *")
        data = image.sections.get(FIB, b"")
        if len(data) != ffi.sizeof("struct tundp_fib"):
            raise Unfit("the image has no FIB")
        ffi.memmove(fib, data, len(data))
        # A section borrows from the image's bytes, which the cdata keeps alive.
        self._arrays: dict[str, Any] = {}
        counts = {"own": "own_count", "broadcasts": "broadcast_count", "table": "table_count"}
        counts |= {"hops": "hop_count", "peers": "peer_count", "peer_hops": "peer_count"}
        for name, item in ARRAYS.items():
            section = image.sections.get(name, b"")
            if len(section) != getattr(fib, counts[name]) * ffi.sizeof(item):
                raise Unfit(f"the image's FIB lacks {name}")
            self._arrays[name] = ffi.from_buffer(f"{item}[]", section)
            setattr(fib, name, self._arrays[name])
        self._arrays["paths"] = ffi.new("struct tundp_path[]", max(1, fib.hop_count))
        fib.ways, fib.paths = fib.hops, self._arrays["paths"]
        if self._lib.tundp_fib_check(fib):
            raise Unfit("the image's FIB is not what C expects")
        return fib

    def _config(self, image: Image, number: int, values: Mapping[str, Any]) -> Any:
        """The config of a worker, but for the memory that is its own."""
        ffi = self._ffi
        config = ffi.new(f"{_CONFIG} *")
        size = ffi.sizeof(_CONFIG)
        data = image.sections[WORKERS][number * size :][:size]
        if len(data) != size:
            raise Unfit("the image lacks a worker")
        ffi.memmove(config, data, size)
        for name in ("notify_fd", "echo_fd", "peer_fd"):
            setattr(config, name, -1)
        for name, value in values.items():
            setattr(config, name, value)
        config.examples = ffi.NULL
        return config


class _Worker:
    """One C worker and its thread, if it has one."""

    def __init__(self, engine: str, config: Any, fib: Any, cpu: int | None) -> None:
        native = require()
        self._ffi, self._lib = native.ffi, native.lib
        loop = LOOPS[engine]
        self._run = getattr(self._lib, f"{loop}_run")
        self._cpu = cpu
        self._config = config
        count = fib.hop_count
        self._memory = allocate(getattr(self._lib, f"{loop}_len")())
        self.hop_counters = self._ffi.new("struct tundp_hop_counters[]", count)
        self.hop_queues = self._ffi.new("struct tundp_hop_queue[]", count)
        config.memory = self._ffi.from_buffer(self._memory)
        config.hop_counters, config.hop_queues = self.hop_counters, self.hop_queues
        self.struct = self._ffi.new("struct tundp_worker *")
        self._lib.tundp_worker_init(self.struct)
        self._configure()
        self._lib.tundp_worker_install(self.struct, fib)
        self._ended = _thread.allocate_lock()
        self._began = _thread.allocate_lock()
        self.has_thread = False
        self.thread = 0
        self.code = 0

    def start(self) -> None:
        self._configure()
        self._ended.acquire()
        self._began.acquire()
        try:
            _thread.start_new_thread(self._serve, ())
        except BaseException:
            self._ended.release()
            self._began.release()
            raise
        self.has_thread = True
        self._began.acquire()  # its id is known from here on
        self._began.release()

    def ask_to_stop(self) -> None:
        if self.has_thread:
            self._lib.tundp_worker_stop(self.struct)

    def join(self) -> None:
        if self.has_thread:
            self._ended.acquire()
            self._ended.release()
            self.has_thread = False

    def _configure(self) -> None:
        code = self._lib.tundp_worker_configure(self.struct, self._config)
        if code:
            raise Unfit(f"the image's values are refused: {os.strerror(-code)}")

    def _serve(self) -> None:
        self.thread = _thread.get_native_id()
        self._began.release()
        try:
            if self._cpu is not None:
                with suppress(OSError):  # taken away since: better anywhere than nowhere
                    os.sched_setaffinity(0, {self._cpu})
            self.code = -self._run(self.struct)
        finally:
            self._ended.release()


def allocate(length: int) -> mmap.mmap:
    """Memory of its own, from the kernel: nobody else's data on its pages."""
    length = -(-length // _HUGE) * _HUGE
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
