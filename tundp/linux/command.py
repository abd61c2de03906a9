"""Run a small program to completion; its stderr becomes the error when it fails.

For tools that are the only documented door to something (iptables, nft). The child gets
two variables, PATH and LC_ALL=C, so that its messages can be read; it never outlives the
call, whether that ends by itself, by the time limit or by cancellation.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO, Final, TypeVar

from tundp.errors import PlatformError
from tundp.linux import capability, sandbox

T = TypeVar("T")

TIMEOUT_S: Final = 10.0
"""Timeout of a program; listing 20,000 rules takes a fifth of a second."""
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
"""Searched after PATH: that of an ordinary user's shell lacks the sbin directories."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A completed program: exit code and output."""

    argv: tuple[str, ...]
    code: int
    """Exit code, or minus the signal's number."""
    stdout: str
    stderr: str
    capabilities: tuple[int, ...] = (capability.CAP_NET_ADMIN,)
    """What the kernel asks of whoever runs it."""

    @property
    def complaint(self) -> str:
        """The first line of stderr that is no remark (`# Warning: ...`); may be empty."""
        lines = (line.strip() for line in self.stderr.splitlines())
        return next((line for line in lines if line and not line.startswith("#")), "")

    def error(self) -> PlatformError:
        """The exception for an unexpected exit code."""
        said = self.complaint or "it said nothing"
        hint = ""
        if re.search(r"permission denied|not permitted|must be root", said, re.IGNORECASE):
            hint = f"; {capability.lack_of(self.capabilities)}"
        return PlatformError(
            f"{' '.join(self.argv)} failed with exit code {self.code}: {said}{hint}"
        )


def find(name: str) -> str | None:
    """The program's path; None if it is not installed."""
    return shutil.which(name, path=_search_path())


def environment() -> dict[str, str]:
    """The variables a program is run with."""
    return {"PATH": _search_path(), "LC_ALL": "C"}


async def run(
    *argv: str,
    package: str,
    stdin: str = "",
    is_checked: bool = True,
    timeout_s: float = TIMEOUT_S,
    capabilities: tuple[int, ...] = (capability.CAP_NET_ADMIN,),
) -> Finished:
    """Run a program with `stdin` as its input, in the namespaces of the calling thread.

    `package` is the Debian package to name if the program is missing; `capabilities` are those
    it needs, of which an error names the missing ones. PlatformError if it
    is (errno ENOENT), if it takes too long (ETIMEDOUT), and, unless `is_checked` is
    false, if its exit code is not 0.
    """
    path = find(argv[0])
    if path is None:
        raise PlatformError(
            f"cannot run {' '.join(argv)}: there is no {argv[0]} here;"
            f" install it (Debian package {package})",
            errno.ENOENT,
        )
    # Files, not pipes: a program that ends before it has read all, or is killed while we
    # listen, raises nothing here; asyncio and uvloop would tell it by different exceptions.
    with _file(stdin) as source, _file() as stdout, _file() as stderr:
        code = await _run_with(path, argv, (source, stdout, stderr), timeout_s)
        finished = Finished(
            argv=argv,
            code=code,
            stdout=_text(stdout),
            stderr=_text(stderr),
            capabilities=capabilities,
        )
    if is_checked and finished.code != 0:
        raise finished.error()
    return finished


async def try_all(steps: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Run every step, then raise all failures as one PlatformError with the first one's errno."""
    done: list[T] = []
    errors: list[PlatformError] = []
    for step in steps:
        try:
            done.append(await step())
        except PlatformError as error:
            errors.append(error)
    if errors:
        raise PlatformError("; ".join(map(str, errors)), errors[0].errno)
    return done


async def _run_with(
    path: str, argv: tuple[str, ...], files: tuple[BinaryIO, BinaryIO, BinaryIO], timeout_s: float
) -> int:
    stdin, stdout, stderr = (file.fileno() for file in files)
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            path,
            *argv[1:],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=environment(),
            # Control-C in our terminal is for us, and we end with nothing half done; and
            # whatever the program starts can be killed with it.
            start_new_session=True,
        )
    )
    try:
        # Whole even if we are cancelled: uvloop 0.22 kills a program whose start is cancelled,
        # but does not wait for its end.
        process = await asyncio.shield(starting)
        async with asyncio.timeout(timeout_s):
            return await process.wait()
    except TimeoutError:
        raise PlatformError(
            f"{' '.join(argv)} was stopped: it took more than {timeout_s:g} s;"
            " see whether another program holds the firewall's lock (/run/xtables.lock)",
            errno.ETIMEDOUT,
        ) from None
    except OSError as error:
        why = f"{error.strerror or error}{sandbox.hint(error.errno)}"
        raise PlatformError(f"cannot run {path}: {why}", error.errno) from None
    finally:
        await _end(starting)


async def _end(starting: asyncio.Future[asyncio.subprocess.Process]) -> None:
    await asyncio.wait({starting})
    if starting.exception() is not None:
        return
    process = starting.result()
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # SIGKILL cannot be ignored: this wait is short, and leaves no zombie.
        await asyncio.shield(process.wait())


def _file(text: str = "") -> BinaryIO:
    try:
        descriptor = os.memfd_create("tundp")
    except OSError as error:
        raise PlatformError(f"cannot run a program: {error.strerror}", error.errno) from None
    file = open(descriptor, "w+b")  # noqa: SIM115  (the caller's `with`)
    file.write(text.encode())
    file.seek(0)
    return file


def _text(file: BinaryIO) -> str:
    # The program's writes moved the offset, which it shares with us.
    file.seek(0)
    return file.read().decode(errors="replace")


def _search_path() -> str:
    return ":".join(filter(None, (os.environ.get("PATH"), SYSTEM_PATH)))
