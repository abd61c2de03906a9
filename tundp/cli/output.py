"""Exit codes, and where the program prints. Nothing outside tundp/cli prints or exits."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from tundp.errors import FILES_STEP, FilterError
from tundp.printable import LINE_MAX, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""


_SECCOMP_STEP: Final = (
    "allow it in the seccomp profile of the container, or in SystemCallFilter= of the unit"
)


def reserve_streams() -> bool:
    """Give closed standard descriptors to /dev/null; whether standard output was open.

    A file or socket opened later would have its number, and get what is printed. Python takes a
    closed standard error for standard output.
    """
    is_open = True
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            is_open = is_open and number != 1
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            os.set_inheritable(number, True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return is_open


def forget_output() -> None:
    """Let what is still to be printed go to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def flushed(code: int) -> int:
    """The exit code once everything printed has left: EXIT_FAILED if it cannot be written.

    Python itself would find out when the program ends, and say so in its own words.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        forget_output()
    except OSError as error:
        forget_output()
        if code == EXIT_OK:
            print_error(f"cannot write standard output: {error.strerror}")
            return EXIT_FAILED
    return code


def leave(code: int) -> int:
    """Return the exit code; where a thread is busy that no cancellation ended, exit at once.

    What was printed is flushed before; that nobody reads it any more is no error.
    """
    from tundp.doctor.deadline import is_busy

    if is_busy():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


def print_error(text: object, program: str = "tundp") -> None:
    """One line on stderr."""
    print(f"{program}: {printable(str(text), LINE_MAX)}", file=sys.stderr)


def print_filter_error(error: FilterError, program: str = "tundp") -> None:
    """What is wrong with a packet filter, the filter, and a caret under the place."""
    reason, shown, caret = error.lines()
    print_error(f"filter: {reason}", program)
    print(f"  {shown}\n  {caret}", file=sys.stderr)


def print_line(text: str) -> None:
    """One line on stdout, names of devices, chains and files in it."""
    print(printable(text, LINE_MAX))


def sandbox_words(error: BaseException) -> str:
    """One line about what the kernel or a sandbox refused; empty for what is a bug instead.

    For errors nobody foresaw where they were raised: refused system calls, no descriptor, memory
    or thread to be had.
    """
    import traceback  # 0.01 s that --help need not wait for

    where = traceback.extract_tb(error.__traceback__)[-1:]
    at = f" (in {where[0].name}, {os.path.basename(where[0].filename)})" if where else ""
    if isinstance(error, RuntimeError):
        if "can't start new thread" not in str(error):
            return ""
        return f"{error}{at}: too many processes, or a seccomp filter that refuses clone3"
    if isinstance(error, OSError) and type(error).__name__ == "SSLError":
        # OpenSSL says "malloc failure" where it has no random numbers.
        try:
            os.getrandom(1, os.GRND_NONBLOCK)
        except OSError as refused:
            return f"OpenSSL cannot work without getrandom(2): {refused.strerror}; {_SECCOMP_STEP}"
    # Errnos of libraries' own, as in ssl.SSLError, are not the kernel's.
    if not isinstance(error, OSError) or type(error).__module__ != "builtins":
        return ""
    name = f": {error.filename}" if error.filename else ""
    text = f"{error.strerror}{name}{at}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{text}; {FILES_STEP}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        # Of a file its writer would have said more: this is what was printed.
        return f"cannot write: {text}; free space, or write elsewhere"
    if error.errno == errno.ENOMEM:
        return f"{text}; allow more memory: MemoryMax= of the unit, --memory, ulimit -v"
    if error.errno == errno.EACCES:
        return f"{text}; run this as root, and see who may read it"
    if error.errno in (errno.EPERM, errno.ENOSYS):
        return f"{text}; a sandbox refuses a system call: {_SECCOMP_STEP}"
    return ""


def print_json(value: Any) -> None:
    """A value for programs."""
    print(json.dumps(value, indent=2))


def print_parts(parts: Iterable[RenderableType]) -> None:
    """Print what `tundp.show` makes. It fits itself to the terminal: nothing may be cropped."""
    console = terminal()
    for part in parts:
        console.print(part, crop=False)


def terminal() -> Console:
    """Where tables go: colours and widths of a terminal, or plain text in a pipe.

    BrokenPipeError of printing to it: nobody reads any more.
    """
    from rich.console import Console  # 0.1 s that --help need not wait for

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich ends the process with exit code 1 instead

    return Terminal(highlight=False)
