"""The file store: written by hand, shared by processes, and never half of anything."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.store.support import (
    FileWorld,
    Runner,
    attributes,
    by_key,
    following,
    lease_key,
    outcome,
    run,
)
from tests.wait import until
from tundp.errors import ConfigNotFound, Conflict, StoreUnavailable
from tundp.store import file as file_module
from tundp.store.file import FileStore

A, B = lease_key("10.5.1.0-24"), lease_key("10.5.2.0-24")
ONE, TWO = attributes("192.0.2.1"), attributes("192.0.2.2")


@pytest.fixture
def only_inotify(monkeypatch: pytest.MonkeyPatch) -> None:
    """The poll of once a second comes too late for any test."""
    monkeypatch.setattr(file_module, "_POLL_S", 3600.0)


def test_two_stores_on_one_file_see_each_other(
    file_world: FileWorld, run: Runner, only_inotify: None
) -> None:
    async def main() -> None:
        ours, theirs = file_world.open(), file_world.open()
        for number in range(5):
            snapshot = await ours.snapshot()
            waiting = asyncio.ensure_future(outcome(ours.wait(snapshot.revision)))
            await asyncio.sleep(0.02)
            created = await theirs.create(lease_key(f"10.5.{number}.0-24"), ONE, 600)
            news = await waiting
            assert len(news.leases) == number + 1
            assert news.revision >= created.revision

    run(main())


def test_a_change_between_snapshot_and_wait_is_not_missed(
    file_world: FileWorld, only_inotify: None
) -> None:
    async def main() -> None:
        ours, theirs = file_world.open(), file_world.open()
        snapshot = await ours.snapshot()
        await theirs.create(A, ONE, 600)
        assert by_key((await ours.wait(snapshot.revision)).leases) == {str(A): "192.0.2.1"}

    run(main())


def test_hand_written_leases(file_world: FileWorld, run: Runner) -> None:
    file_world.path.write_text(
        """
        {
          "config": {"Network": "10.5.0.0/16"},
          "leases": {
            "10.5.1.0-24": {"PublicIP": "192.0.2.1"},
            "10.5.2.0-24": {"publicip": "192.0.2.2", "Rack": "b7"}
          }
        }
        """
    )

    async def main() -> None:
        store = file_world.open()
        assert json.loads(await store.network_config()) == {"Network": "10.5.0.0/16"}
        snapshot = await store.snapshot()
        assert snapshot.bad == ()
        assert by_key(snapshot.leases) == {str(A): "192.0.2.1", str(B): "192.0.2.2"}
        assert all(lease.is_reservation for lease in snapshot.leases)
        first = next(lease for lease in snapshot.leases if lease.key == A)
        updated = await store.update(A, ONE, None, revision=first.revision)
        assert updated.revision > first.revision
        with pytest.raises(Conflict):
            await store.update(A, TWO, None, revision=first.revision)
        with pytest.raises(Conflict):
            await store.create(B, ONE, 60)
        assert file_world.document()["leases"]["10.5.2.0-24"] == {
            "publicip": "192.0.2.2",
            "Rack": "b7",
        }

    run(main())


@pytest.mark.parametrize("text", ["{}", '{"config": {"Network": "10.5.0.0/16"}}', '{"leases": {}}'])
def test_file_with_no_leases_yet(file_world: FileWorld, text: str) -> None:
    file_world.path.write_text(text)

    async def main() -> None:
        store = file_world.open()
        assert (await store.snapshot()).leases == ()
        await store.create(A, ONE, 60)
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}
        assert file_world.document().get("config") == json.loads(text).get("config")

    run(main())


FOREIGN: dict[str, Any] = {
    "rubbish": {"PublicIP": "192.0.2.9", "Expires": 4e9, "Ünïcode \ud800 \n": [1, 2.5, None, True]},
    "10.5.70.0-24": "a string",
    "10.5.71.0-24": ["a", {"list": 12345678901234567890123}],
    "10.5.72.0-24": None,
    "10.5.73.0-24": {"PublicIP": 7},
    "10.5.74.0-24": {"PublicIP": "192.0.2.9", "Expires": "tomorrow"},
    "10.5.75.0-24": {"PublicIP": "192.0.2.9", "Expires": True},
    "10.5.76.0-24": {},
    "10.5.77.0-24": {"PublicIP": "192.0.2.7", "Revision": "high", "Extra": {"z": 1, "a": -0.0}},
}


def test_what_we_do_not_understand_survives_our_writes(file_world: FileWorld) -> None:
    foreign = {
        "notes": ["by hand", 1e-7, 10**30],
        "config": {"Network": "10.5.0.0/16", "X": 1},
    }
    file_world.path.write_text(json.dumps(foreign | {"leases": FOREIGN, "revision": "many"}))

    async def main() -> None:
        store = file_world.open()
        created = await store.create(A, ONE, 600)
        updated = await store.update(A, TWO, 600, revision=created.revision)
        await store.delete(A, revision=updated.revision)
        document = file_world.document()
        assert {name: document[name] for name in foreign} == foreign
        assert document["leases"] == FOREIGN
        assert list(document["leases"]) == list(FOREIGN)

    run(main())


def test_expiry_that_is_no_time_is_poison_and_not_expiry(file_world: FileWorld) -> None:
    rubbish: list[object] = ["tomorrow", True, [], {}]
    for expires in rubbish:
        file_world.path.write_text(
            json.dumps({"leases": {str(A): {"PublicIP": "192.0.2.1", "Expires": expires}}})
        )

        async def main() -> None:
            store = file_world.open()
            snapshot = await store.snapshot()
            assert [entry.name for entry in snapshot.bad] == [str(A)]
            with pytest.raises(Conflict):
                await store.create(A, TWO, 60)

        run(main())


def test_deeply_nested_rubbish_is_an_error_of_ours(file_world: FileWorld) -> None:
    """Whatever the nesting: a StoreError, or it works. Not a RecursionError."""

    async def main() -> None:
        store = file_world.open()
        for depth in (400, 900, 5000, 200_000):
            file_world.path.write_text('{"leases": {}, "x": ' + "[" * depth + "]" * depth + "}")
            for call in (store.snapshot(), store.create(A, ONE, 60)):
                result = await outcome(call)
                assert not isinstance(result, RecursionError), depth

    run(main())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b'{"leases": {',
        b"[]",
        b"null",
        b'{"leases": []}',
        b'{"leases": null}',
        b"\xff\xfe\x00",
        b"\x00" * 4096,
    ],
)
def test_garbage_is_named_and_recovered_from(file_world: FileWorld, content: bytes) -> None:
    async def main() -> None:
        store = file_world.open()
        created = await store.create(A, ONE, 600)
        good = file_world.path.read_bytes()
        file_world.path.write_bytes(content)
        for call in (
            store.network_config(),
            store.snapshot(),
            store.create(B, TWO, 60),
            store.update(A, TWO, 60, revision=created.revision),
            store.delete(A, revision=created.revision),
        ):
            with pytest.raises(StoreUnavailable) as caught:
                await call
            assert str(file_world.path) in str(caught.value)
        assert file_world.path.read_bytes() == content
        file_world.path.write_bytes(good)
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}

    run(main())


def test_followers_keep_their_peers_through_garbage(file_world: FileWorld, run: Runner) -> None:
    async def main() -> None:
        file_world.put(str(A), '{"PublicIP":"192.0.2.1"}')
        async with following(file_world.open()) as follower:
            good = file_world.path.read_text()
            file_world.path.write_text(good[: len(good) // 2])
            await until(lambda: follower.outage.is_on)
            assert follower.known() == {str(A): "192.0.2.1"}
            file_world.path.write_text(good.replace("192.0.2.1", "192.0.2.3"))
            await until(lambda: follower.known() == {str(A): "192.0.2.3"})
            assert not follower.outage.is_on

    run(main())


def test_missing_file_says_what_to_write(file_world: FileWorld) -> None:
    async def main() -> None:
        store = file_world.open()
        file_world.path.unlink()
        for call in (store.network_config(), store.snapshot(), store.create(A, ONE, 60)):
            with pytest.raises(ConfigNotFound) as caught:
                await call
            assert str(file_world.path) in str(caught.value)
            assert '"Network"' in str(caught.value)
        assert not file_world.path.exists()

    run(main())


def test_missing_directory_is_a_store_error_and_recovers(tmp_path: Path, run: Runner) -> None:
    path = tmp_path / "not-yet" / "leases.json"

    async def main() -> None:
        store = FileStore(path)
        with pytest.raises(ConfigNotFound):
            await store.snapshot()
        with pytest.raises((StoreUnavailable, ConfigNotFound)):
            await store.create(A, ONE, 60)
        async with following(store) as follower:
            path.parent.mkdir()
            path.write_text('{"leases": {"10.5.1.0-24": {"PublicIP": "192.0.2.1"}}}')
            await until(lambda: follower.known() == {str(A): "192.0.2.1"})
        await store.close()

    run(main())


def test_file_removed_while_followed_comes_back(file_world: FileWorld, run: Runner) -> None:
    async def main() -> None:
        file_world.put(str(A), '{"PublicIP":"192.0.2.1"}')
        async with following(file_world.open()) as follower:
            text = file_world.path.read_text()
            file_world.path.unlink()
            await until(lambda: follower.outage.is_on)
            assert follower.known() == {str(A): "192.0.2.1"}
            file_world.path.write_text(text.replace("192.0.2.1", "192.0.2.2"))
            await until(lambda: follower.known() == {str(A): "192.0.2.2"})

    run(main())


def test_directory_in_place_of_the_file(tmp_path: Path) -> None:
    async def main() -> None:
        store = FileStore(tmp_path)
        for call in (store.snapshot(), store.create(A, ONE, 60)):
            with pytest.raises(StoreUnavailable, match=str(tmp_path)):
                await call
        await store.close()

    run(main())


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    """Root may write everywhere, so for a while we are not root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_unwritable_directory_can_be_read_and_says_so_when_written() -> None:
    directory = Path(tempfile.mkdtemp(prefix="tundp-store-"))
    path = directory / "leases.json"
    path.write_text('{"leases": {"10.5.1.0-24": {"PublicIP": "192.0.2.1"}}}')
    path.chmod(0o444)
    directory.chmod(0o555)

    async def main() -> None:
        store = FileStore(path)
        (lease,) = (await store.snapshot()).leases
        for call in (
            store.create(B, TWO, 60),
            store.update(A, TWO, 60, revision=lease.revision),
            store.delete(A, revision=lease.revision),
        ):
            with pytest.raises(StoreUnavailable, match=r"leases\.json: Permission denied"):
                await call
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}
        await store.close()

    try:
        with _as_nobody():
            run(main())
        assert [entry.name for entry in directory.iterdir()] == ["leases.json"]
    finally:
        directory.chmod(0o755)
        shutil.rmtree(directory)


WRITER = """
import asyncio, ipaddress, sys
from pathlib import Path
from tundp.lease.model import LeaseAttributes, LeaseKey
from tundp.store.file import FileStore

async def main(path, who, count):
    store = FileStore(Path(path))
    ip = LeaseAttributes(public_ip=ipaddress.IPv4Address(f"192.0.2.{who}"))
    for number in range(count):
        key = LeaseKey(ipaddress.IPv4Interface(f"10.{who}.{number}.0/24"))
        lease = await store.create(key, ip, 600)
        await store.update(key, ip, 600, revision=lease.revision)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


def test_writers_in_several_processes_lose_nothing_and_readers_see_whole_files(
    file_world: FileWorld,
) -> None:
    processes, count = 4, 20
    command = [sys.executable, "-c", WRITER, str(file_world.path)]
    writers = [
        subprocess.Popen([*command, str(who), str(count)]) for who in range(1, processes + 1)
    ]

    async def main() -> int:
        store = file_world.open()
        reads, leases = 0, 0
        while any(writer.poll() is None for writer in writers):
            json.loads(file_world.path.read_text())
            now = len((await store.snapshot()).leases)
            assert now >= leases
            leases = now
            reads += 1
        return reads

    try:
        assert run(main()) > 10
        assert [writer.wait() for writer in writers] == [0] * processes
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    document = file_world.document()
    assert len(document["leases"]) == processes * count
    assert document["revision"] == processes * count * 2
    revisions = [entry["Revision"] for entry in document["leases"].values()]
    assert len(set(revisions)) == len(revisions)
    left = {entry.name for entry in file_world.path.parent.iterdir()}
    assert left == {"leases.json", "leases.json.lock"}


def test_failed_write_leaves_no_temporary_file(
    file_world: FileWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        store = file_world.open()
        await store.create(A, ONE, 60)
        before = file_world.path.read_bytes()

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreUnavailable, match="No space left"):
                await store.create(B, TWO, 60)
        assert file_world.path.read_bytes() == before
        left = {entry.name for entry in file_world.path.parent.iterdir()}
        assert left == {"leases.json", "leases.json.lock"}
        await store.create(B, TWO, 60)

    run(main())


def test_lock_held_for_ever_is_named(
    file_world: FileWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "LOCK_S", 0.2)

    async def main() -> None:
        store = file_world.open()
        fd = os.open(f"{file_world.path}.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with pytest.raises(StoreUnavailable, match=r"json\.lock"):
                await store.create(A, ONE, 60)
            assert (await store.snapshot()).leases == ()
        finally:
            os.close(fd)
        await store.create(A, ONE, 60)

    run(main())


def test_link_and_mode_of_the_file_stay(file_world: FileWorld, tmp_path: Path) -> None:
    link = tmp_path / "link" / "leases.json"
    link.parent.mkdir()
    link.symlink_to(file_world.path)
    file_world.path.chmod(0o640)

    async def main() -> None:
        through_link, direct = FileStore(link), file_world.open()
        await through_link.create(A, ONE, 60)
        with pytest.raises(Conflict):
            await direct.create(A, TWO, 60)
        assert link.is_symlink()
        assert file_world.path.stat().st_mode & 0o777 == 0o640
        assert [entry.name for entry in link.parent.iterdir()] == ["leases.json"]
        await through_link.close()

    run(main())


def test_expiry_follows_the_clock_given(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    path.write_text("{}")
    now = 1_000_000.0

    async def main() -> None:
        nonlocal now
        store = FileStore(path, now=lambda: now)
        await store.create(A, ONE, 60)
        assert json.loads(path.read_text())["leases"][str(A)]["Expires"] == 1_000_060.0
        now += 59
        (lease,) = (await store.snapshot()).leases
        assert lease.lease_ttl_s == 1
        now += 1
        assert (await store.snapshot()).leases == ()
        with pytest.raises(Conflict):
            await store.update(A, ONE, 60, revision=lease.revision)
        await store.create(A, TWO, 60)
        await store.close()

    run(main())


def test_waits_leave_no_descriptors_behind(file_world: FileWorld, run: Runner) -> None:
    async def main() -> None:
        store = file_world.open()
        revision = (await store.snapshot()).revision
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            waiting = asyncio.ensure_future(store.wait(revision))
            await asyncio.sleep(0.002)
            waiting.cancel()
            await asyncio.wait([waiting])
        assert len(os.listdir("/proc/self/fd")) <= before

    run(main())


READ_ONLY = """
import asyncio, sys
from pathlib import Path
from tests.store.support import attributes, lease_key
from tundp.errors import StoreUnavailable
from tundp.store.file import FileStore
async def main():
    store = FileStore(Path(sys.argv[1]))
    try:
        await store.create(lease_key("10.5.1.0-24"), attributes("192.0.2.1"), 60)
    except StoreUnavailable as error:
        print(error)
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_read_only_file_system_is_explained(tmp_path: Path) -> None:
    """As below ProtectSystem=strict, where the same path can be written from a root shell."""
    (tmp_path / "leases.json").write_text('{"config": {"Network": "10.5.0.0/16"}}')
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c"),
            'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"',
            *("sh", tmp_path, sys.executable, "-c", READ_ONLY, tmp_path / "leases.json"),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"cannot write {tmp_path}/leases.json: Read-only file system here" in done.stdout
    assert "/var/lib/tundp" in done.stdout
    assert "ReadWritePaths=" in done.stdout


ANOTHER = 65533
"""A user who is neither root nor whoever runs the tests."""


def _plant(kind: str, open_to_all: Path, secret: Path) -> Path:
    """What another user puts into a folder like /tmp; the path of a lease file that leads there."""
    path = open_to_all / "leases.json"
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "file":
        path.write_text(secret.read_text())
        os.chown(path, ANOTHER, ANOTHER)
    elif kind == "second name":
        path.hardlink_to(secret)
    elif kind == "folder":
        path = open_to_all / "below" / "leases.json"
        path.parent.mkdir()
        path.write_text(secret.read_text())
        os.chown(path.parent, ANOTHER, ANOTHER)
    else:
        (open_to_all / "below").symlink_to(secret.parent)
        path = open_to_all / "below" / secret.name
    return path


@pytest.mark.parametrize("kind", ["link", "file", "second name", "folder", "link to a folder"])
def test_what_another_user_put_into_tmp_is_neither_read_nor_replaced(
    tmp_path: Path, kind: str
) -> None:
    if os.geteuid():
        pytest.skip("only root can make another user's files")
    open_to_all = tmp_path / "tmp"
    open_to_all.mkdir()
    open_to_all.chmod(0o1777)
    secret = tmp_path / "secret" / "config.json"
    secret.parent.mkdir()
    secret.write_text('{"config": {"Network": "10.5.0.0/16"}, "leases": {}, "revision": 3}')
    before = secret.read_text()
    path = _plant(kind, open_to_all, secret)

    async def main() -> None:
        store = FileStore(path)
        for attempt in (store.network_config, store.snapshot, lambda: store.create(A, ONE, 60)):
            with pytest.raises(StoreUnavailable, match="which anybody may write") as caught:
                await attempt()
            assert "name a folder that is root's alone" in str(caught.value)
        await store.close()

    run(main())
    assert secret.read_text() == before
    assert [each.name for each in secret.parent.iterdir()] == [secret.name], "no lock beside it"


def test_a_link_put_into_tmp_later_is_not_followed_either(tmp_path: Path) -> None:
    open_to_all = tmp_path / "tmp"
    open_to_all.mkdir()
    open_to_all.chmod(0o1777)
    path = open_to_all / "leases.json"
    path.write_text('{"config": {"Network": "10.5.0.0/16"}, "leases": {}}')
    secret = tmp_path / "secret"
    secret.write_text(path.read_text())

    async def main() -> None:
        store = FileStore(path)
        await store.create(A, ONE, 60)
        before = secret.read_text()
        path.unlink()
        path.symlink_to(secret)
        with pytest.raises(StoreUnavailable, match="is a symbolic link"):
            await store.snapshot()
        with pytest.raises(StoreUnavailable, match="is a symbolic link"):
            await store.create(B, TWO, 60)
        assert secret.read_text() == before
        await store.close()

    run(main())
