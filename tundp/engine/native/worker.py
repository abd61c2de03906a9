"""One packet thread: its C struct, the memory that points to, its life."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import threading
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any, Final

_log = logging.getLogger(__name__)

_HUGE: Final = 2 << 20


class Worker:
    """One thread, its C struct and the memory that points to."""

    def __init__(self, native: Any, run: Any, sock: socket.socket, queue: int) -> None:
        self._native = native
        self._run = run
        self._sock = sock  # keeps the descriptor open
        self.queue = queue
        self._memory: mmap.mmap | None = None
        self._thread: threading.Thread | None = None
        self.control_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.struct = native.ffi.new("struct tundp_worker *")
        native.lib.tundp_worker_init(self.struct)
        self.struct.udp_fd = sock.fileno()
        self.struct.control_fd = self.control_fd

    @property
    def is_running(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

    def allocate_batch(self) -> None:
        """Memory of its own, from the kernel: nobody else's data on its pages."""
        length = -(-self._native.lib.tundp_batch_len() // _HUGE) * _HUGE
        self._memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.struct.batch = self._native.ffi.cast(
            "struct tundp_batch *", self._native.ffi.from_buffer(self._memory)
        )

    def start(self, name: str, cpu: int | None, on_end: Callable[[int], object]) -> None:
        """Start the thread. on_end: called on it with the errno the loop ended with, if any."""
        self.struct.stop = 0
        self.struct.name = name.encode()[: self._native.lib.TUNDP_NAME_LEN - 1]
        self._thread = threading.Thread(
            target=self._serve, args=(cpu, on_end), name=name, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Waits for the thread, which ends after at most a burst of packets."""
        if self._thread is not None:
            self._native.lib.tundp_worker_stop(self.struct)
            self._thread.join()
            self._thread = None

    def beat(self) -> int:
        """See Dataplane.pulse."""
        return int(self._native.lib.tundp_worker_beat(self.struct))

    def rebound(self, address: IPv4Address) -> None:
        """The descriptor leads to a new socket, whose overflows the kernel counts from zero."""
        self.struct.address = int(address)
        self.struct.overflows_before = self.struct.counters.socket_overflows

    def close(self) -> None:
        """Stop the thread and close what is its own; not the socket."""
        self.stop()
        os.close(self.control_fd)
        self.struct.control_fd = -1

    def _serve(self, cpu: int | None, on_end: Callable[[int], object]) -> None:
        if cpu is not None:
            try:
                os.sched_setaffinity(0, {cpu})
            except OSError as error:
                # Taken away since the flag was checked: better anywhere than nowhere.
                _log.warning("cannot stay on CPU %d: %s", cpu, error.strerror)
        code = self._run(self.struct)
        if code:
            on_end(-code)
