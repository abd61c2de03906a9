"""The loop of `tundp hold`: one command, started again when it fails, with its descriptors.

    main process   the command, or the successor it names (MAINPID=)
    ends with      exit code 0, 2 or 127, and a signal that asks to end: then the holder ends, too
    else           it is started again, RESTART_S later, START_S after a start that failed at once
    watchdog       once READY: SIGABRT when WATCHDOG=1 stays out, SIGKILL END_S later

systemd/tundp.service does the same. Nothing a client sends ends it: see messages.py.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from typing import Final

from tundp.hold.child import prctl, say, start
from tundp.hold.kept_fds import ROOM, KeptFds
from tundp.hold.messages import Message, NotifySocket, tell
from tundp.linux import uapi

RESTART_S: Final = 0.1
"""Short: packets wait in the queues."""
START_S: Final = 2.0
"""From one start to the next, if the first was never ready."""
END_S: Final = 15.0
"""A command told to end has so long; then it is killed."""
FINAL_CODES: Final = (0, 2, 127)
"""Stopped; wrong usage; no such command: no new attempt mends these."""
FINAL_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)
"""As systemd's Restart=on-failure has it."""
_PASSED_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_HANDLED: Final = frozenset({*_PASSED_ON, signal.SIGHUP, signal.SIGCHLD})
_FORWARDED: Final = ("READY", "STATUS", "RELOADING", "EXTEND_TIMEOUT_USEC")
_MESSAGES: Final = 256
"""Read at a time: a flood must not keep from looking at the clock."""


class _Main:
    """The process in charge."""

    def __init__(self, pid: int, began: float) -> None:
        self.pid = pid
        self.began = began
        self.is_ready = False
        self.fed_at = began
        self.kill_at: float | None = None
        """When it is killed; None while nobody wants it to end."""
        self.pidfd = -1
        with contextlib.suppress(OSError):  # Linux < 5.3: SIGCHLD tells of our children
            self.pidfd = os.pidfd_open(pid)

    def send(self, number: int) -> None:
        """Send it a signal; by its pidfd, which is nobody else's."""
        with contextlib.suppress(OSError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)
            else:
                os.kill(self.pid, number)

    def has_ended(self) -> bool:
        """Whether it has, be it reaped or not, and whosever child it is."""
        if self.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the pidfd."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Holder:
    """See the module. One thread, one loop."""

    def __init__(self, command: Sequence[str], watchdog_s: float) -> None:
        """watchdog_s: 0 for none. OSError if there is no place for the socket."""
        self._command = tuple(command)
        self._watchdog_s = watchdog_s
        self._outer = os.environ.get("NOTIFY_SOCKET", "")
        self._outer_feed_s = _outer_watchdog_s() / 3
        self._outer_fed_at = 0.0
        self._socket = NotifySocket()
        self._kept = KeptFds()
        self._main: _Main | None = None
        self._start_at = time.monotonic()
        self._is_stopping = False
        self._is_restarting = False
        self._statuses: dict[int, int] = {}
        """What waitpid(2) said of the main process."""
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """Hold until the command has ended for good; the exit code."""
        prctl(uapi.PR_SET_NAME, b"tundp hold")
        # A successor's parent may end: it becomes our child, as orphans of a container do.
        prctl(uapi.PR_SET_CHILD_SUBREAPER, 1)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for each in _HANDLED:
            signal.signal(each, lambda *_: None)
        code = None
        while code is None:
            code = self._step()
        return code

    def close(self) -> None:
        """End what is left of the command, and close everything: device and ports go."""
        signal.set_wakeup_fd(-1)
        for pid in _children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if self._main is not None:
            self._main.close()
        self._kept.close()
        self._socket.close()
        os.close(self._wake)
        os.close(self._woken)

    def _step(self) -> int | None:
        now = time.monotonic()
        if self._main is None and now >= self._start_at:
            self._start(now)
        self._wait(now)
        # Before anybody is reaped: the last words of a process count, and so does its pid.
        self._read_messages()
        for number in self._read_signals():
            self._on_signal(number)
        self._reap()
        now = time.monotonic()
        main = self._main
        if main is not None and (main.pid in self._statuses or main.has_ended()):
            self._read_messages()
            if self._main is main:
                return self._ended(main, self._statuses.pop(main.pid, None), now)
        self._statuses.clear()
        self._look_at_clock(now)
        return 0 if self._is_stopping and self._main is None else None

    def _start(self, now: float) -> None:
        environment = {**os.environ, "NOTIFY_SOCKET": self._socket.path, "FDSTORE": str(ROOM)}
        environment.pop("WATCHDOG_USEC", None)
        if self._watchdog_s:
            environment["WATCHDOG_USEC"] = str(int(self._watchdog_s * 1e6))
        self._is_restarting = False
        try:
            pid = start(self._command, environment, self._kept.all, _HANDLED)
        except OSError as error:
            say(f"no process can be started now: {error.strerror}")
            self._start_at = now + START_S
            return
        self._main = _Main(pid, now)

    def _wait(self, now: float) -> None:
        dues = [] if self._main is not None else [self._start_at]
        if self._main is not None and self._main.kill_at is not None:
            dues.append(self._main.kill_at)
        elif self._main is not None and self._is_watched(self._main):
            dues.append(self._main.fed_at + self._watchdog_s)
        if self._outer_feed_s:
            dues.append(self._outer_fed_at + self._outer_feed_s)
        poll = select.poll()
        for fd in (self._socket.fileno(), self._wake):
            poll.register(fd, select.POLLIN)
        if self._main is not None and self._main.pidfd >= 0:
            poll.register(self._main.pidfd, select.POLLIN)
        poll.poll(max(0.0, min(dues) - now) * 1000 + 1 if dues else None)

    def _is_watched(self, main: _Main) -> bool:
        return bool(self._watchdog_s) and main.is_ready

    def _look_at_clock(self, now: float) -> None:
        main = self._main
        if self._outer_feed_s and now >= self._outer_fed_at + self._outer_feed_s:
            self._outer_fed_at = now
            tell(self._outer, "WATCHDOG=1")
        if main is None:
            return
        if main.kill_at is not None:
            if now >= main.kill_at:
                say(f"process {main.pid} does not end: killing it")
                main.send(signal.SIGKILL)
                main.kill_at = now + END_S
        elif self._is_watched(main) and now >= main.fed_at + self._watchdog_s:
            say(f"process {main.pid} has been silent for {self._watchdog_s:g} s: aborting it")
            main.send(signal.SIGABRT)
            main.send(signal.SIGCONT)  # a stopped one takes no signal but SIGKILL before
            main.kill_at = now + END_S

    def _on_signal(self, number: int) -> None:
        main = self._main
        now = time.monotonic()
        if number in (signal.SIGTERM, signal.SIGINT):
            self._is_stopping = True
        elif number == signal.SIGHUP and not self._is_stopping:
            say("SIGHUP: starting the command again")
            self._is_restarting = True
            self._start_at = now
        if main is None:
            return
        if number in _PASSED_ON:
            main.send(number)
        elif number == signal.SIGHUP:
            main.send(signal.SIGTERM)
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            main.kill_at = main.kill_at or now + END_S

    def _ended(self, main: _Main, status: int | None, now: float) -> int | None:
        """What follows from the end of the main process: an exit code, or None for another start.

        status: of waitpid(2); None if it was nobody's child of ours, and its exit code unknown.
        """
        main.close()
        self._main = None
        code = None if status is None else os.waitstatus_to_exitcode(status)
        if self._is_stopping:
            return 0 if code in (None, 0, -signal.SIGTERM, -signal.SIGINT) else 1
        if self._is_restarting:
            self._start_at = now
            return None
        if code in FINAL_CODES:
            return code
        if code is not None and -code in FINAL_SIGNALS:
            return 128 - code
        self._start_at = now + RESTART_S
        if not main.is_ready:
            self._start_at = max(self._start_at, main.began + START_S)
        text = f"{self._command[0]} {_words(code)}, starting it again"
        say(text)
        tell(self._outer, f"STATUS={text}") if self._outer else None
        return None

    def _read_messages(self) -> None:
        for _ in range(_MESSAGES):
            message = self._socket.receive()
            if message is None:
                return
            try:
                main = self._main
                if main is not None and message.pid == main.pid:
                    message = self._take(message, main)
            finally:
                message.close()

    def _take(self, message: Message, main: _Main) -> Message:
        """Do what the main process says; the message with the descriptors that were not taken."""
        fields = message.fields
        if "MAINPID" in fields:
            self._follow(fields["MAINPID"])
        if fields.get("READY") == "1":
            main.is_ready = True
            main.fed_at = time.monotonic()
        if fields.get("WATCHDOG") == "1":
            main.fed_at = time.monotonic()
        if self._outer:
            names = (*_FORWARDED, "STOPPING") if self._is_stopping else _FORWARDED
            lines = [f"{name}={fields[name]}" for name in names if name in fields]
            if lines:
                tell(self._outer, "\n".join(lines))
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTOREREMOVE") == "1":
            self._kept.remove(name)
        elif fields.get("FDSTORE") == "1":
            for fd in message.fds:
                if why := self._kept.put(name, fd):
                    say(f"a descriptor of process {main.pid} is not kept: {why}")
            return message._replace(fds=())
        return message

    def _follow(self, text: str) -> None:
        """Another process is the main one from now on."""
        main = self._main
        number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
        if main is None or number == main.pid:
            return
        successor = _Main(number, time.monotonic()) if number > 1 else None
        if successor is None or number == os.getpid() or successor.pidfd < 0:
            say(f"process {main.pid} names {text[:20]} its successor, which is no process")
            if successor is not None:
                successor.close()
            return
        say(f"process {number} goes on for {main.pid}")
        # It was ready before it took over, and says so again; fed it is from now on.
        successor.is_ready = main.is_ready
        main.close()
        self._main = successor
        if self._is_stopping or self._is_restarting:
            # The signal went to the one before, which was gone already.
            successor.send(signal.SIGTERM)
            successor.kill_at = time.monotonic() + END_S

    def _read_signals(self) -> bytes:
        with contextlib.suppress(OSError):
            return os.read(self._wake, 512)
        return b""

    def _reap(self) -> None:
        """Take leave of every child that has ended, orphans of others included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if self._main is not None and pid == self._main.pid:
                self._statuses[pid] = status


def hold(arguments: Sequence[str]) -> int:
    """Run the holder with the watchdog's seconds and a command line; the exit code."""
    try:
        holder = Holder(arguments[1:], float(arguments[0]))
    except OSError as error:
        say(f"cannot listen for the command: {error.strerror} ({error.filename})")
        return 1
    try:
        return holder.run()
    finally:
        holder.close()


def _words(code: int | None) -> str:
    if code is None:
        return "has ended"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"has ended with exit code {code}"


def _children() -> list[int]:
    """Processes whose parent we are."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(each) for each in file.read().split()]
    except OSError:
        return []


def _outer_watchdog_s() -> float:
    """Seconds within which our own supervisor wants to hear of us; 0: never."""
    text = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(text) / 1e6 if text.isdecimal() and pid == str(os.getpid()) else 0.0
