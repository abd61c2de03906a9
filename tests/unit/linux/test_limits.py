"""What stands in for refused system calls, and what is said of limits; filters are real."""

from __future__ import annotations

import os
import resource
import select
import subprocess
import sys
import threading

import pytest

from tests.netns.test_tried_sandbox import refusing
from tundp.blocking import start_thread
from tundp.errors import PlatformError
from tundp.linux import limits

UNLIMITED = resource.RLIM_INFINITY


def in_child(wrapper: list[str], body: str) -> str:
    program = f"import sys\nsys.path[:0] = {sys.path!r}\n{body}"
    answer = subprocess.run(
        [*wrapper, sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


EVENT = """
import os, select
from tundp.linux.limits import open_event, why_no_eventfd
fd = open_event()
other = open_event()
poll = select.poll()
poll.register(fd, select.POLLIN)
def is_readable(): return bool(poll.poll(0))
print(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0], why_no_eventfd() or "granted")
for _ in range(3):
    assert not is_readable()
    assert not os.get_inheritable(fd)
    os.eventfd_write(fd, 1)
    assert is_readable()
    os.eventfd_read(fd)
written = 0
for _ in range(5000):  # more than any queue holds: a write is lost, the signal is not
    try:
        os.eventfd_write(fd, 1)
        written += 1
    except BlockingIOError:
        break
assert written and is_readable()
while is_readable():
    os.eventfd_read(fd)
try:
    os.eventfd_read(fd)
except BlockingIOError:
    print("empty")
import socket
spy = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
if why_no_eventfd():
    name = socket.socket(fileno=os.dup(fd)).getsockname()
    try:
        spy.sendto(b"x" * 8, name)
    except PermissionError:
        print("nobody else's")
"""


def test_an_event_without_eventfd() -> None:
    assert in_child([], EVENT).splitlines() == ["anon_inode granted", "empty"]
    assert in_child(refusing("eventfd2"), EVENT).splitlines() == [
        "socket Operation not permitted",
        "empty",
        "nobody else's",
    ]


def test_an_event_is_an_eventfd_where_there_is_one() -> None:
    fd = limits.open_event()
    try:
        assert not select.select([fd], [], [], 0)[0]
    finally:
        os.close(fd)
    assert limits.why_no_eventfd() == ""


@pytest.mark.parametrize(
    ("both", "most", "wanted"),
    [
        ((30, UNLIMITED), 1000, 1000),
        ((30, 500), 1000, 500),
        ((30, 5000), 1000, 1000),
        ((500, 500), 1000, None),
        ((UNLIMITED, UNLIMITED), 1000, None),
        ((2000, 5000), 1000, None),
    ],
)
def test_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, both: tuple[int, int], most: int, wanted: int | None
) -> None:
    """Unlimited is -1 for Python. Linux itself never says so of open files; gVisor may."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: both)
    monkeypatch.setattr(resource, "setrlimit", lambda _, now: asked.append(now))
    monkeypatch.setattr(limits, "_nr_open", lambda: most)
    assert limits.raise_file_limit() == ""
    assert asked == ([] if wanted is None else [(wanted, wanted)])


def test_limit_of_open_files_is_raised_for_real() -> None:
    body = """
import resource
from tundp.linux import limits
assert limits.raise_file_limit() == ""
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    assert in_child(["prlimit", "--nofile=30:500"], body).strip() == "(500, 500)"


def test_a_limit_that_may_not_be_read_is_said() -> None:
    body = """
from tundp.linux import limits
print(limits.raise_file_limit())
print([each.id for each in limits.findings()])
"""
    out = in_child(refusing("rlimits"), body).splitlines()
    assert out[0], out
    assert out[1] == "['limits.rlimits']"


def test_a_thread_beyond_the_limit_of_processes() -> None:
    """Not only seccomp: `pids.max`, `ulimit -u`, as any user but root."""
    body = """
import os, resource, threading
from tundp.blocking import start_thread
from tundp.errors import PlatformError
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
os.setgroups([])
os.setgid(61234)
os.setuid(61234)
try:
    start_thread(threading.Thread(target=print, name="spare"))
except PlatformError as error:
    print(error)
"""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    out = in_child([], body)
    assert "cannot start the thread 'spare'" in out
    assert "pids.max" in out
    assert "clone3" not in out


def test_a_thread_started_twice_is_a_bug_and_says_so() -> None:
    thread = threading.Thread(target=lambda: None)
    start_thread(thread)
    thread.join()
    with pytest.raises(RuntimeError, match="only be started once") as caught:
        start_thread(thread)
    assert not isinstance(caught.value, PlatformError)
