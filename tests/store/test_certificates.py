"""Certificate files that change while a daemon runs, and what is accepted of a server."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.store.pki import Pki
from tests.store.support import (
    Etcd3World,
    EtcdWorld,
    attributes,
    following,
    lease_key,
    outcome,
    run,
)
from tests.wait import until
from tundp.errors import ConfigError, StoreUnavailable
from tundp.lab.etcd import PrivateEtcd, ServerTls
from tundp.store.access import EtcdAccess
from tundp.store.tls import H2, HTTP, TlsFiles

A, B = lease_key("10.5.1.0-24"), lease_key("10.5.2.0-24")
ONE = attributes("192.0.2.1")
AnyWorld = EtcdWorld | Etcd3World
FILES = {"cafile": "ca.pem", "certfile": "node.pem", "keyfile": "node.key"}


@pytest.fixture(params=[EtcdWorld, Etcd3World], ids=["v2", "v3"])
def api(request: pytest.FixtureRequest) -> type[AnyWorld]:
    """Which API is spoken."""
    found: type[AnyWorld] = request.param
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Two generations, `old-*` and `new-*`: a CA, and a server and a client certificate of it."""
    pki = Pki(tmp_path_factory.mktemp("two"))
    for age in ("old", "new"):
        pki.make_ca(f"{age}-ca")
        pki.make(f"{age}-server", ca=f"{age}-ca", usage="serverAuth", alt_name="IP:127.0.0.1")
        pki.make(f"{age}-client", ca=f"{age}-ca", usage="clientAuth")
    return pki


class Place:
    """The folders that etcd and a daemon read their files from."""

    def __init__(self, root: Path, pki: Pki) -> None:
        self.pki = pki
        self.server, self.node = root / "server", root / "node"
        self.server.mkdir()
        self.node.mkdir()
        self.renew_server("old")
        self.renew_node("old")

    @property
    def access(self) -> dict[str, str]:
        return {flag: str(self.node / name) for flag, name in FILES.items()}

    @property
    def server_tls(self) -> ServerTls:
        return ServerTls(
            certfile=self.server / "server.pem",
            keyfile=self.server / "server.key",
            cafile=self.server / "ca.pem",
        )

    def renew_server(self, age: str) -> None:
        shutil.copy(self.pki.cert(f"{age}-server"), self.server / "server.pem")
        shutil.copy(self.pki.key(f"{age}-server"), self.server / "server.key")
        shutil.copy(self.pki.cert(f"{age}-ca"), self.server / "ca.pem")

    def renew_node(self, age: str, *flags: str) -> None:
        sources = {
            "cafile": self.pki.cert(f"{age}-ca"),
            "certfile": self.pki.cert(f"{age}-client"),
            "keyfile": self.pki.key(f"{age}-client"),
        }
        for flag in flags or FILES:
            shutil.copy(sources[flag], self.node / FILES[flag])


@pytest.fixture
def place(tmp_path: Path, two: Pki) -> Place:
    return Place(tmp_path, two)


@pytest.fixture
def etcd(place: Place, start_etcd: Callable[..., PrivateEtcd]) -> PrivateEtcd:
    return start_etcd(client_tls=place.server_tls)


@contextlib.contextmanager
def world_of(etcd: PrivateEtcd, api: type[AnyWorld]) -> Iterator[AnyWorld]:
    with contextlib.closing(api(etcd.plain_url)) as world:
        yield world


async def restart(etcd: PrivateEtcd) -> None:
    await etcd.stop()
    await etcd.start()


async def is_there(call: Callable[[], Any]) -> bool:
    """Whether a call succeeds; a connection that has just gone is no other failure."""
    result = await outcome(call())
    assert isinstance(result, StoreUnavailable) or not isinstance(result, BaseException), result
    return not isinstance(result, BaseException)


# Renewed files


def renew_in_place(place: Place) -> None:
    place.renew_node("new")


def renew_by_link(place: Place) -> None:
    """As Kubernetes does: the names lead through ..data, which is switched in one step."""
    later = place.node / "..later"
    later.mkdir()
    for flag, source in (
        ("cafile", place.pki.cert("new-ca")),
        ("certfile", place.pki.cert("new-client")),
        ("keyfile", place.pki.key("new-client")),
    ):
        shutil.copy(source, later / FILES[flag])
    os.symlink("..later", place.node / "..data_tmp")
    os.replace(place.node / "..data_tmp", place.node / "..data")


def start_with_links(place: Place) -> None:
    first = place.node / "..first"
    first.mkdir()
    for name in FILES.values():
        os.replace(place.node / name, first / name)
        os.symlink(f"..data/{name}", place.node / name)
    os.symlink("..first", place.node / "..data")


@pytest.mark.parametrize("renew", [renew_in_place, renew_by_link])
def test_renewed_files_are_read_for_the_next_connection(
    etcd: PrivateEtcd, place: Place, api: type[AnyWorld], renew: Callable[[Place], None]
) -> None:
    """CA, certificate and key change on both sides; the old ones would not do on either."""
    if renew is renew_by_link:
        start_with_links(place)

    async def main(world: AnyWorld) -> None:
        store = world.open_at(etcd.url, **place.access)
        async with following(store) as follower:
            lease = await store.create(A, ONE, 600)
            await until(lambda: str(A) in follower.known())
            await etcd.stop()
            renew(place)
            place.renew_server("new")
            await etcd.start()
            await until(lambda: is_there(store.snapshot))
            await store.update(A, ONE, 600, revision=lease.revision)
            world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())
            assert store.warnings == ()

    with world_of(etcd, api) as world:
        run(main(world))


def test_ca_bundle_carries_over_to_a_new_ca(
    etcd: PrivateEtcd, place: Place, api: type[AnyWorld]
) -> None:
    """Old and new CA in one file, then the servers' certificates; etcd restarts for those only."""

    async def main(world: AnyWorld) -> None:
        store = world.open_at(etcd.url, **place.access)
        await store.create(A, ONE, 600)
        bundle = place.pki.cert("old-ca").read_bytes() + place.pki.cert("new-ca").read_bytes()
        for folder in (place.node, place.server):
            (folder / "ca.pem").write_bytes(bundle)
        for name in ("server.pem", "server.key"):
            source = place.pki.directory / f"new-{name}"
            shutil.copy(source, place.server / name)
        await restart(etcd)
        await until(lambda: is_there(store.snapshot))

    with world_of(etcd, api) as world:
        run(main(world))


def test_connection_the_pool_renews_by_itself(etcd: PrivateEtcd, place: Place) -> None:
    """urllib3 replaces a connection that the server has closed without asking anybody."""

    async def main(world: EtcdWorld) -> None:
        store = world.open_at(etcd.url, **place.access)
        await store.create(A, ONE, 600)
        await etcd.stop()
        place.renew_node("new")
        place.renew_server("new")
        await etcd.start()
        # The very first call: the pool finds its connection dropped, and connects anew.
        assert len((await store.snapshot()).leases) == 1

    with contextlib.closing(EtcdWorld(etcd.plain_url)) as world:
        run(main(world))


# Files that cannot be used


def truncate(place: Place, flag: str) -> None:
    path = place.node / FILES[flag]
    os.truncate(path, path.stat().st_size // 2)


def cut_second_ca(place: Place) -> None:
    path = place.node / FILES["cafile"]
    path.write_bytes(path.read_bytes() + place.pki.cert("new-ca").read_bytes()[:200])


BREAKAGES: dict[str, tuple[Callable[[Place], object], str]] = {
    "certificate new, key old": (lambda place: place.renew_node("new", "certfile"), "node.key"),
    "key new, certificate old": (lambda place: place.renew_node("new", "keyfile"), "node.key"),
    "certificate cut": (lambda place: truncate(place, "certfile"), "node.pem"),
    "key cut": (lambda place: truncate(place, "keyfile"), "node.key"),
    "CA cut": (lambda place: truncate(place, "cafile"), "ca.pem"),
    "second CA cut": (cut_second_ca, "ca.pem"),
    "key empty": (lambda place: os.truncate(place.node / "node.key", 0), "node.key"),
    "certificate gone": (lambda place: os.unlink(place.node / "node.pem"), "node.pem"),
    "CA is no certificate": (
        lambda place: (place.node / "ca.pem").write_text("-----BEGIN X-----\n-----END X-----\n"),
        "ca.pem",
    ),
}


@pytest.mark.parametrize("breakage", sorted(BREAKAGES))
def test_files_that_cannot_be_used_change_nothing(
    place: Place, caplog: pytest.LogCaptureFixture, breakage: str
) -> None:
    caplog.set_level(logging.INFO)
    spoil, name = BREAKAGES[breakage]
    access = EtcdAccess(endpoints=("https://127.0.0.1:1",), prefix="/x", **place.access)
    tls = TlsFiles(access)
    before = tls.context(H2)
    assert tls.context(H2) is before
    assert not caplog.messages
    spoil(place)
    for _ in range(3):
        assert tls.context(H2) is before
    (warning,) = tls.warnings
    assert name in warning.evidence
    assert warning.next_step
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert name in record.message
    place.renew_node("new")
    assert tls.context(H2) is not before
    assert tls.warnings == ()
    assert [record.levelno for record in caplog.records[1:]] == [logging.INFO] * 2
    # Another fault is another line; the same one, met again, too.
    truncate(place, "keyfile")
    tls.context(HTTP)
    os.unlink(place.node / "node.key")
    tls.context(HTTP)
    assert [record.levelno for record in caplog.records[3:]] == [logging.WARNING] * 2


def test_half_a_pair_leaves_the_connection_as_it_is(
    etcd: PrivateEtcd, place: Place, api: type[AnyWorld]
) -> None:
    async def main(world: AnyWorld) -> None:
        store = world.open_at(etcd.url, **place.access)
        await store.create(A, ONE, 600)
        place.renew_node("new", "certfile")
        await restart(etcd)
        await until(lambda: is_there(store.snapshot))
        (warning,) = store.warnings
        assert "node.key" in warning.evidence

    with world_of(etcd, api) as world:
        run(main(world))


_WITHOUT_RIGHTS = """
import os, sys
from tundp.linux import capability
from tundp.store.access import EtcdAccess
from tundp.store.tls import H2, TlsFiles

cafile, certfile, keyfile = sys.argv[1:]
access = EtcdAccess(
    endpoints=("https://127.0.0.1:1",), prefix="/x", cafile=cafile, certfile=certfile,
    keyfile=keyfile,
)
tls = TlsFiles(access)
capability.keep_only([capability.CAP_NET_ADMIN])
tls.context(H2)
for warning in tls.warnings:
    print(warning.evidence)
    print(warning.next_step)
"""


def test_key_of_another_user_is_reported_once_rights_are_dropped(place: Place) -> None:
    """Root reads it at the start, and the daemon that it becomes does not."""
    if os.geteuid() != 0:
        pytest.skip("needs root: only root can read another user's file at first")
    key = place.node / "node.key"
    os.chown(key, 65534, 65534)
    key.chmod(0o600)
    # Else the folders of pytest are what cannot be read.
    argv = [sys.executable, "-c", _WITHOUT_RIGHTS, *place.access.values()]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert f"--etcd-keyfile {key} may not be read (owner 65534:65534, mode 0600)" in done.stdout
    assert "chgrp root FILE" in done.stdout
    os.chown(key, 65534, 0)
    key.chmod(0o640)
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""


@pytest.mark.parametrize("what", ["encrypted key", "pipe", "folder"])
def test_file_that_can_never_be_used_is_a_config_error(place: Place, what: str) -> None:
    key = place.node / "node.key"
    if what == "encrypted key":
        argv = ["openssl", "ec", "-in", str(key), "-aes128", "-passout", "pass:abcd", "-out"]
        subprocess.run([*argv, str(place.node / "locked.key")], check=True, capture_output=True)
        os.replace(place.node / "locked.key", key)
        expected = "encrypted"
    elif what == "pipe":
        key.unlink()
        os.mkfifo(key)
        expected = "not a regular file"
    else:
        key.unlink()
        key.mkdir()
        expected = "irectory"
    access = EtcdAccess(endpoints=("https://127.0.0.1:1",), prefix="/x", **place.access)
    with pytest.raises(ConfigError, match=expected) as caught:
        TlsFiles(access)
    assert "node.key" in str(caught.value)


# What is accepted of a server


@pytest.fixture
def as_python_3_13(monkeypatch: pytest.MonkeyPatch) -> None:
    """ssl.create_default_context sets VERIFY_X509_STRICT, as it does from Python 3.13 on."""
    make = ssl.create_default_context

    def make_strict(*args: Any, **options: Any) -> ssl.SSLContext:
        context = make(*args, **options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", make_strict)


ALT_NAME = "subjectAltName=IP:127.0.0.1"
HOME_MADE: dict[str, tuple[list[str], str]] = {
    # The recipe of most how-tos: `x509 -req` adds no authority key identifier.
    "no key identifiers": (
        [
            "req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=ca -keyout ca.key -out ca.pem",
            "req -new -newkey rsa:2048 -nodes -subj /CN=etcd -keyout s.key -out s.csr",
            "x509 -req -in s.csr -CA ca.pem -CAkey ca.key -days 9 -extfile alt.cnf -out s.pem",
        ],
        "ca.pem",
    ),
    "CA of version 1": (
        [
            "req -new -newkey rsa:2048 -nodes -subj /CN=ca -keyout ca.key -out ca.csr",
            "x509 -req -in ca.csr -signkey ca.key -days 9 -out ca.pem",
            "req -new -newkey rsa:2048 -nodes -subj /CN=etcd -keyout s.key -out s.csr",
            "x509 -req -in s.csr -CA ca.pem -CAkey ca.key -days 9 -extfile alt.cnf -out s.pem",
        ],
        "ca.pem",
    ),
    "signed by itself": (
        [
            "req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=etcd -keyout s.key -out s.pem"
            f" -addext {ALT_NAME} -addext basicConstraints=CA:FALSE",
        ],
        "s.pem",
    ),
    "intermediate as anchor": (
        [
            "req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=root -keyout r.key -out r.pem",
            "req -new -newkey rsa:2048 -nodes -subj /CN=ca -keyout ca.key -out ca.csr",
            "x509 -req -in ca.csr -CA r.pem -CAkey r.key -days 9 -extfile ca.cnf -out ca.pem",
            "req -new -newkey rsa:2048 -nodes -subj /CN=etcd -keyout s.key -out s.csr",
            "x509 -req -in s.csr -CA ca.pem -CAkey ca.key -days 9 -extfile alt.cnf -out s.pem",
        ],
        "ca.pem",
    ),
}


@pytest.mark.parametrize("kind", sorted(HOME_MADE))
@pytest.mark.usefixtures("as_python_3_13")
def test_certificate_that_go_accepts_is_accepted(
    tmp_path: Path, start_etcd: Callable[..., PrivateEtcd], api: type[AnyWorld], kind: str
) -> None:
    commands, anchor = HOME_MADE[kind]
    (tmp_path / "alt.cnf").write_text(ALT_NAME)
    (tmp_path / "ca.cnf").write_text("basicConstraints=CA:TRUE")
    openssl(tmp_path, commands)
    server = ServerTls(certfile=tmp_path / "s.pem", keyfile=tmp_path / "s.key")
    etcd = start_etcd(client_tls=server)

    async def main(world: AnyWorld) -> None:
        store = world.open_at(etcd.url, cafile=str(tmp_path / anchor))
        await store.create(A, ONE, 600)

    with world_of(etcd, api) as world:
        run(main(world))


def test_name_in_the_cn_alone_does_not_count(
    tmp_path: Path, start_etcd: Callable[..., PrivateEtcd], api: type[AnyWorld]
) -> None:
    """Go's clients refuse it since 1.15; the error says what is missing."""
    openssl(
        tmp_path,
        ["req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=localhost -keyout s.key -out s.pem"],
    )
    server = ServerTls(certfile=tmp_path / "s.pem", keyfile=tmp_path / "s.key")
    etcd = start_etcd(client_tls=server)

    async def main(world: AnyWorld) -> None:
        url = etcd.url.replace("127.0.0.1", "localhost")
        error = await outcome(world.open_at(url, cafile=str(tmp_path / "s.pem")).snapshot())
        assert isinstance(error, StoreUnavailable)
        assert "subjectAltName" in str(error), str(error)

    with world_of(etcd, api) as world:
        run(main(world))


def openssl(directory: Path, commands: list[str]) -> None:
    for command in commands:
        argv = ["openssl", *command.split()]
        done = subprocess.run(argv, cwd=directory, capture_output=True, check=False)
        assert done.returncode == 0, (command, done.stderr.decode())
