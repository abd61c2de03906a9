"""Execs a program with descriptors as systemd gives them: sd_listen_fds(3).

argv: JSON of names to descriptors, a descriptor times are written to (0: none), then the program
and its arguments. Times are CLOCK_MONOTONIC and this process's CPU time right before execve(2), ns,
8 bytes each.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time

FIRST_FD = 3
HIGH_FD = 200

given: dict[str, int] = json.loads(sys.argv[1])
clock_fd = int(sys.argv[2])
# Out of each other's way first: what is above is close-on-exec, what dup2 makes is not.
parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD) for fd in given.values()]
if clock_fd:
    clock_fd = fcntl.fcntl(clock_fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
os.closerange(FIRST_FD, HIGH_FD)
for number, fd in enumerate(parked):
    os.dup2(fd, FIRST_FD + number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(given))
os.environ["LISTEN_FDNAMES"] = ":".join(given)
if clock_fd:
    times = time.monotonic_ns(), time.process_time_ns()
    os.write(clock_fd, b"".join(each.to_bytes(8, sys.byteorder) for each in times))
os.execv(sys.argv[3], sys.argv[3:])
