"""One packet thread: its C struct, the memory that points to, its life."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tundp.blocking import start_thread
from tundp.choices import Engine
from tundp.engine.native.early import LOOPS, allocate
from tundp.engine.native.library import require
from tundp.errors import PlatformError
from tundp.linux.limits import open_event
from tundp.wire.policy import NO_ECHO_ID

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class WorkerSetup:
    """What stays the same for a worker's whole life; descriptors are borrowed."""

    engine: Engine
    queue: int
    """Number of the TUN's queue and of the socket."""
    udp_fd: int
    notify_fd: int
    echo_fd: int
    peer_fd: int
    directions: int
    hop_counters: Any
    """Where it counts per hop."""
    hop_queues: Any
    """Where it keeps which hops have a send socket of their own."""
    icmp_budget: Any
    """The uint64_t all workers of the node share."""
    examples: Any
    """Its flight recorder, an array of struct tundp_examples, or NULL."""


class Worker:
    """One thread, its C struct and the memory that points to."""

    def __init__(self, setup: WorkerSetup) -> None:
        native = require()
        self._native = native
        self._setup = setup
        self._thread: threading.Thread | None = None
        loop = LOOPS[setup.engine.value]
        self._run = getattr(native.lib, f"{loop}_run")
        self._memory = allocate(getattr(native.lib, f"{loop}_len")())
        self._control_fd = open_event()
        self.struct = native.ffi.new("struct tundp_worker *")
        native.lib.tundp_worker_init(self.struct)
        self.configure()

    @property
    def queue(self) -> int:
        """Number of the TUN's queue and of the socket."""
        return self._setup.queue

    @property
    def is_running(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

    def configure(self, **values: Any) -> None:
        """Give the worker, which must not run, a new configuration: fields of the C struct."""
        setup, ffi = self._setup, self._native.ffi
        config = ffi.new(
            "struct tundp_worker_config *",
            {
                "tun_fd": -1,
                "udp_fd": setup.udp_fd,
                "control_fd": self._control_fd,
                "notify_fd": setup.notify_fd,
                "echo_fd": setup.echo_fd,
                "peer_fd": setup.peer_fd,
                "directions": setup.directions,
                "max_segments": 1,
                "max_udp_segments": 1,
                "memory": ffi.from_buffer(self._memory),
                "hop_counters": setup.hop_counters,
                "hop_queues": setup.hop_queues,
                "icmp_full_at_ns": setup.icmp_budget,
                "examples": setup.examples,
                **values,
            },
        )
        code = self._native.lib.tundp_worker_configure(self.struct, config)
        if code:
            raise PlatformError(f"the C engine refuses {values}: {os.strerror(-code)}", -code)

    def early_config(self) -> bytes:
        """How it was configured last, for workers of another process: engine/native/early.py.

        No pointer, no descriptor, and nothing that measures paths, whose answers nobody awaits.
        """
        ffi = self._native.ffi
        config = ffi.new("struct tundp_worker_config *")
        ffi.memmove(config, ffi.addressof(self.struct.config), ffi.sizeof(config[0]))
        for name, field in ffi.typeof(config[0]).fields:
            if field.type.kind == "pointer":
                setattr(config, name, ffi.NULL)
            elif name.endswith("_fd"):
                setattr(config, name, -1)
        config.policy.echo_id = NO_ECHO_ID
        return bytes(ffi.buffer(config))

    def start(self, name: str, cpu: int | None, on_end: Callable[[int], object]) -> None:
        """Start the thread; configure before. on_end: called on it with the errno, if any."""
        self._thread = threading.Thread(
            target=self._serve, args=(cpu, on_end), name=name, daemon=True
        )
        start_thread(self._thread)

    def stop(self) -> None:
        """Wait for the thread, which ends after at most a burst of packets."""
        if self._thread is not None:
            self._native.lib.tundp_worker_stop(self.struct)
            self._thread.join()
            self._thread = None

    def install(self, native_fib: Any) -> None:
        """Publish a FIB's struct to the worker."""
        self._native.lib.tundp_worker_install(self.struct, native_fib)

    def tap(self, native_taps: Any) -> None:
        """Publish taps, a struct tundp_taps, to the worker."""
        self._native.lib.tundp_worker_tap(self.struct, native_taps)

    def taps_seen(self) -> int:
        """Generation of the newest taps it uses; it holds none older."""
        return int(self._native.lib.tundp_worker_taps_seen(self.struct))

    def seen(self) -> int:
        """`generation` of the newest struct tundp_fib it uses; it holds none older; 0 none yet."""
        return int(self._native.lib.tundp_worker_seen(self.struct))

    def heartbeat(self) -> int:
        """See Dataplane.heartbeat."""
        return int(self._native.lib.tundp_worker_heartbeat(self.struct))

    def hop_sockets(self) -> int:
        """How many hops have a send socket of their own now."""
        return int(self._native.lib.tundp_worker_hop_sockets(self.struct))

    def disabled(self) -> int:
        """Offloads the kernel has refused it: bits of enum tundp_offload."""
        return int(self._native.lib.tundp_worker_disabled(self.struct))

    def restore(self) -> None:
        """Have it try refused offloads again."""
        self._native.lib.tundp_worker_restore(self.struct)

    def rebound(self) -> None:
        """The descriptor leads to a new socket, whose overflows the kernel counts from zero."""
        self._native.lib.tundp_worker_rebound(self.struct)

    def close(self) -> None:
        """Stop the thread and close what is its own; not the socket."""
        self.stop()
        os.close(self._control_fd)

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
