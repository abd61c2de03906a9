"""Traffic from C threads (native/bench/), each in a namespace of its choice.

A generator is a thread that enters a lab host's namespace, opens its socket there and
stays in one C call, GIL released, until it is told to stop. Counters are read while it
runs. Payloads are a known pattern, checked byte for byte where they arrive.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tundp.errors import LabError, Unsupported
from tundp.lab.lab import Host
from tundp.linux import uapi
from tundp.linux.netlink import enter_namespace

try:
    from tundp import _traffic
except ImportError as import_error:
    _traffic = None  # type: ignore[assignment]
    _missing = str(import_error)

ABI: Final = 5
TIMEOUT: Final = struct.pack("@ll", 0, 200_000)
"""SO_RCVTIMEO and SO_SNDTIMEO: how often a blocked generator looks whether to stop."""
BUFFER_LEN: Final = 4 << 20
NUMBERED_BUFFER_LEN: Final = 64 << 20
"""What a queue held back comes all at once."""
PACED_BUFFER_LEN: Final = 256 << 10
HURRY_NICE: Final = -10
"""Where real-time scheduling is not allowed."""
MEMINFO_LEN: Final = 4 * (uapi.SK_MEMINFO_DROPS + 1)
SEEN_BITS: Final = 1 << 22
SAMPLES_MAX: Final = 1 << 20
JOIN_S: Final = 10.0
_runs = itertools.count(1)


def require() -> Any:
    """The extension module, or Unsupported with the way to build it."""
    if _traffic is None:
        raise Unsupported(f"the traffic module is not built ({_missing}): run make build")
    if _traffic.lib.TRAFFIC_ABI != ABI:
        raise Unsupported("the traffic module is of another version: run make build")
    return _traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A generator's counters at one moment; the fields are struct traffic's."""

    bytes: int
    messages: int
    corrupt: int
    reordered: int
    duplicates: int
    stale: int
    lost: int
    refused: int
    samples: int
    late_ns: int
    stall_ns: int
    stall_at_ns: int


@dataclass(frozen=True, slots=True)
class Numbered:
    """Numbered datagrams in the order they came: their numbers, and when (CLOCK_MONOTONIC, ns)."""

    numbers: npt.NDArray[np.uint64]
    at_ns: npt.NDArray[np.uint64]

    @classmethod
    def room_for(cls, count: int) -> Numbered:
        """Memory for so many; none of it is used before they come."""
        return cls(np.zeros(count, np.uint64), np.zeros(count, np.uint64))


class Generator:
    """One thread. `start` returns when its socket is open, so order decides who listens first."""

    def __init__(self, host: Host, open_and_run: Callable[[Any, Generator], None]) -> None:
        self._library = require()
        self.traffic = self._library.ffi.new("struct traffic *")
        self.sock: socket.socket | None = None
        self.samples_ns: npt.NDArray[np.uint32] | None = None
        self.kernel_drops = 0
        """Of a receiver of numbered datagrams, once it is stopped: what its buffer had no room for
        (SO_MEMINFO, Linux 4.12)."""
        self._host = host
        self._run = open_and_run
        self._is_open = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> Generator:
        """Start the thread; LabError if its socket cannot be opened."""
        self._thread.start()
        is_open = self._is_open.wait(JOIN_S)
        if self._failure is not None or not is_open:
            raise LabError(f"traffic in {self._host.namespace}: {self._failure or 'no answer'}")
        return self

    def check(self) -> None:
        """LabError if it ended by itself: what it counted since is no measurement."""
        if self.traffic.error:
            raise LabError(
                f"traffic in {self._host.namespace} ended: {os.strerror(self.traffic.error)}"
            )

    def ready(self) -> None:
        """Say from the thread that the socket is open."""
        self._is_open.set()

    def counted(self) -> Counted:
        """The counters now."""
        t = self.traffic
        return Counted(
            bytes=t.bytes,
            messages=t.messages,
            corrupt=t.corrupt,
            reordered=t.reordered,
            duplicates=t.duplicates,
            stale=t.stale,
            lost=t.lost,
            refused=t.refused,
            samples=t.samples,
            late_ns=t.late_ns,
            stall_ns=t.stall_ns,
            stall_at_ns=t.stall_at_ns,
        )

    def tell_to_stop(self) -> None:
        """Ask it to stop; it does within the socket's timeout."""
        self.traffic.stop = 1

    def stop(self) -> None:
        """Stop and join it, and close its socket; harmless when repeated, or before a start."""
        self.tell_to_stop()
        if self._thread.ident is None:
            return
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            raise LabError(f"traffic in {self._host.namespace} does not stop")
        if self.sock is not None:
            self.sock.close()

    def _serve(self) -> None:
        try:
            enter_namespace(self._host.namespace)
            self._run(self._library, self)
        except Exception as error:  # noqa: BLE001  (reported by start)
            self._failure = error
        finally:
            self._is_open.set()


def next_run() -> int:
    """A number for one run of datagrams, so that late ones of the run before are told apart."""
    return next(_runs)


def pattern() -> Any:
    """The payload all generators use; keep it for as long as they run."""
    library = require()
    data = library.ffi.new("uint8_t[]", library.lib.TRAFFIC_PERIOD + library.lib.TRAFFIC_PIECE)
    library.lib.traffic_pattern(data)
    return data


def stream_receiver(host: Host, address: str, port: int, data: Any) -> Generator:
    """Accepts one TCP connection and checks what comes over it."""

    def run(library: Any, generator: Generator) -> None:
        with _listen(address, port) as listener:
            generator.ready()
            connection, _ = listener.accept()
        generator.sock = _prepare(connection)
        library.lib.traffic_stream_receive(connection.fileno(), data, generator.traffic)

    return Generator(host, run)


def stream_sender(
    host: Host, address: str, port: int, data: Any, *, pace: int | None = None
) -> Generator:
    """Connects and sends, at `pace` bytes a second or as fast as it goes."""

    def run(library: Any, generator: Generator) -> None:
        sock = generator.sock = _connect(address, port)
        if pace is not None:
            sock.setsockopt(socket.SOL_SOCKET, uapi.SO_MAX_PACING_RATE, pace)
            # Else megabytes of a slow stream are in the queue when it is told to stop.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACED_BUFFER_LEN)
        generator.ready()
        library.lib.traffic_stream_send(sock.fileno(), data, generator.traffic)
        sock.close()

    return Generator(host, run)


def datagram_receiver(
    host: Host, address: str, port: int, data: Any, *, run_id: int, size: int
) -> Generator:
    """Receives and checks the datagrams of one run; late ones of another are only counted."""

    def run(library: Any, generator: Generator) -> None:
        sock = generator.sock = _bound(address, port)
        seen = library.ffi.new("uint8_t[]", SEEN_BITS // 8)
        generator.ready()
        library.lib.traffic_datagram_receive(
            sock.fileno(), data, size, run_id, seen, SEEN_BITS, generator.traffic
        )

    return Generator(host, run)


def datagram_sender(
    host: Host, address: str, port: int, data: Any, *, run_id: int, size: int, per_ms: int
) -> Generator:
    """Sends datagrams of `size` bytes, `per_ms` a millisecond or as fast as it goes (0)."""

    def run(library: Any, generator: Generator) -> None:
        sock = generator.sock = _prepare(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.connect((address, port))
        generator.ready()
        library.lib.traffic_datagram_send(
            sock.fileno(), data, size, per_ms, run_id, generator.traffic
        )

    return Generator(host, run)


def numbered_receiver(
    host: Host, address: str, port: int, data: Any, *, run_id: int, size: int, arrivals: Numbered
) -> Generator:
    """Receives and checks numbered datagrams, and writes each down in `arrivals`."""

    def run(library: Any, generator: Generator) -> None:
        sock = generator.sock = _bound(address, port, buffer_len=NUMBERED_BUFFER_LEN)
        _hurry()
        generator.ready()
        library.lib.traffic_numbered_receive(
            *(sock.fileno(), data, size, run_id),
            library.ffi.from_buffer("uint64_t[]", arrivals.numbers, require_writable=True),
            library.ffi.from_buffer("uint64_t[]", arrivals.at_ns, require_writable=True),
            len(arrivals.numbers),
            generator.traffic,
        )
        generator.kernel_drops = _drops(sock)

    return Generator(host, run)


def numbered_sender(
    host: Host,
    address: str,
    port: int,
    data: Any,
    *,
    run_id: int,
    size: int,
    rate: int,
    sent_ns: npt.NDArray[np.uint64],
) -> Generator:
    """Sends `rate` numbered datagrams a second; entry n of `sent_ns` is when n was."""

    def run(library: Any, generator: Generator) -> None:
        sock = generator.sock = _prepare(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        _hurry()
        generator.ready()
        library.lib.traffic_numbered_send(
            *(sock.fileno(), data, size, rate, run_id, int(IPv4Address(address)), port),
            library.ffi.from_buffer("uint64_t[]", sent_ns, require_writable=True),
            len(sent_ns),
            generator.traffic,
        )

    return Generator(host, run)


def answerer(host: Host, address: str, port: int, *, is_stream: bool, size: int) -> Generator:
    """Answers requests with themselves."""

    def run(library: Any, generator: Generator) -> None:
        if is_stream:
            with _listen(address, port) as listener:
                generator.ready()
                connection, _ = listener.accept()
            sock = generator.sock = _prepare(connection)
        else:
            sock = generator.sock = _bound(address, port)
            generator.ready()
        library.lib.traffic_answer(sock.fileno(), int(is_stream), size, generator.traffic)

    return Generator(host, run)


def requester(host: Host, address: str, port: int, *, is_stream: bool, size: int) -> Generator:
    """Asks, waits, asks again; keeps every round trip's nanoseconds."""
    samples = np.zeros(SAMPLES_MAX, np.uint32)

    def run(library: Any, generator: Generator) -> None:
        generator.samples_ns = samples
        if is_stream:
            sock = generator.sock = _connect(address, port)
        else:
            sock = generator.sock = _prepare(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.connect((address, port))
        generator.ready()
        library.lib.traffic_request(
            sock.fileno(),
            int(is_stream),
            size,
            library.ffi.from_buffer("uint32_t[]", samples, require_writable=True),
            len(samples),
            generator.traffic,
        )

    return Generator(host, run)


def acceptor(host: Host, address: str, port: int) -> Generator:
    """Accepts connections for `connector`."""

    def run(library: Any, generator: Generator) -> None:
        listener = generator.sock = _prepare(_listen(address, port))
        generator.ready()
        library.lib.traffic_accept(listener.fileno(), generator.traffic)

    return Generator(host, run)


def connector(host: Host, address: str, port: int) -> Generator:
    """Connects, asks, closes, again and again."""

    def run(library: Any, generator: Generator) -> None:
        generator.ready()
        library.lib.traffic_connect(int(IPv4Address(address)), port, generator.traffic)

    return Generator(host, run)


def forward(tun: int, udp: int, *, has_uso: bool) -> None:
    """Forward between a TUN and a UDP socket until one fails: LabError (native/bench/bare.c).

    Both are borrowed, and do not block. has_uso: the TUN takes UDP super-packets.
    """
    library = require()
    traffic = library.ffi.new("struct traffic *")
    library.lib.bare_forward(tun, udp, has_uso, traffic)
    raise LabError(f"the bare forwarder ended: {os.strerror(traffic.error)}")


def burn(seconds: float) -> float:
    """Burn CPU on the calling thread; the CPU seconds it took by the thread's own clock."""
    return int(require().lib.traffic_burn(int(seconds * 1e9))) / 1e9


def _prepare(sock: socket.socket) -> socket.socket:
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEOUT)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEOUT)
    if sock.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _listen(address: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(128)
    listener.settimeout(JOIN_S)
    return listener


def _connect(address: str, port: int) -> socket.socket:
    return _prepare(socket.create_connection((address, port), timeout=JOIN_S))


def _hurry() -> None:
    """Let the calling thread run before others, as packets from a wire come when they come.

    It needs little, and is what time is taken by. sched(7): 0 is the calling thread.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, HURRY_NICE)


def _drops(sock: socket.socket) -> int:
    words = array.array("I")
    words.frombytes(sock.getsockopt(socket.SOL_SOCKET, uapi.SO_MEMINFO, MEMINFO_LEN))
    return words[uapi.SK_MEMINFO_DROPS]


def _bound(address: str, port: int, *, buffer_len: int = BUFFER_LEN) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    # A receiver must not be what loses packets.
    sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, buffer_len)
    sock.bind((address, port))
    return _prepare(sock)
