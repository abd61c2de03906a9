"""The node id and the lease cache on disk: read back as written, and never a reason to fail."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from tundp.instance import Instance
from tundp.lease import codec
from tundp.lease.codec import parse_key
from tundp.lease.model import Lease, LeaseAttributes
from tundp.subnet import lease_cache as memory_module
from tundp.subnet.lease_cache import CachedLeases, LeaseCache

ONE = Instance()
B, C = Instance(Path("/run/b.env")), Instance(Path("/run/c.env"))
CONFIG = '{"Network": "10.5.0.0/16"}'
OWN = parse_key("10.5.1.0-24")
ATTRIBUTES = {
    "10.5.1.0-24": LeaseAttributes(
        public_ip=IPv4Address("192.0.2.1"), extra={"TundpNode": "7c1f", "Rack": {"Row": [1, None]}}
    ),
    "10.5.2.0-24&fd00::-64": LeaseAttributes(
        public_ip=IPv4Address("192.0.2.2"),
        public_ipv6=IPv6Address("2001:db8::2"),
        backend_type="vxlan",
        backend_data={"VtepMAC": "<&>"},
    ),
    "10.5.3.7-24": LeaseAttributes(public_ip=IPv4Address("192.0.2.3")),
}


@pytest.fixture(autouse=True)
def machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """A machine id of the test's own; giving another one makes this a clone."""
    path = tmp_path_factory.mktemp("etc") / "machine-id"

    def become(text: str | None) -> None:
        if text is None:
            path.unlink()
        else:
            path.write_text(f"{text}\n")

    become("0123456789abcdef0123456789abcdef")
    monkeypatch.setattr(memory_module, "_MACHINE_ID", path)
    return become


def lease(key: str, attributes: LeaseAttributes) -> Lease:
    return Lease(key=parse_key(key), attributes=attributes, revision=9, lease_ttl_s=60.0)


NODE_ID = "7c1f000000000001"


def save(memory: LeaseCache, store: str = "etcd:/a", **changes: Any) -> bool:
    return memory.save(
        **{  # type: ignore[arg-type]
            "store": store,
            "node_id": NODE_ID,
            "api": "v3",
            "network_config": CONFIG,
            "own_key": OWN,
            "leases": [lease(key, attributes) for key, attributes in ATTRIBUTES.items()],
            "revision": 77,
        }
        | changes
    )


def lease_file(directory: Path) -> Path:
    path = LeaseCache(directory, ONE).lease_file
    assert path is not None
    return path


def reload(path: Path, store: str = "etcd:/a", instance: Instance = ONE) -> CachedLeases | None:
    return LeaseCache(path, instance).load(store, NODE_ID)


def test_round_trip(tmp_path: Path) -> None:
    save(LeaseCache(tmp_path, ONE))
    found = reload(tmp_path)
    assert found is not None
    assert (found.store, found.api, found.network_config) == ("etcd:/a", "v3", CONFIG)
    assert (found.own_key, found.revision) == (OWN, 77)
    assert {str(lease.key): lease.attributes for lease in found.leases} == ATTRIBUTES
    for one in found.leases:
        # What a later write would have to compare is not remembered, nor when it expires.
        assert one.revision == 0
        assert not one.is_ttl_known


def test_a_later_save_replaces_the_earlier(tmp_path: Path) -> None:
    memory = LeaseCache(tmp_path, ONE)
    save(memory)
    save(memory, leases=[], revision=78)
    found = reload(tmp_path)
    assert found is not None
    assert (found.leases, found.revision) == ((), 78)
    assert os.listdir(tmp_path) == [lease_file(tmp_path).name]


def test_another_stores_leases_are_none_of_ours(tmp_path: Path) -> None:
    save(LeaseCache(tmp_path, ONE), "etcd:/a")
    assert reload(tmp_path, "etcd:/b") is None
    assert reload(tmp_path, "file:/a") is None
    assert reload(tmp_path, "etcd:/a") is not None


def test_a_clones_memory_is_its_originals(tmp_path: Path) -> None:
    save(LeaseCache(tmp_path, ONE))
    assert LeaseCache(tmp_path, ONE).load("etcd:/a", "another") is None


def test_instances_keep_apart(tmp_path: Path) -> None:
    save(LeaseCache(tmp_path, ONE), revision=1)
    save(LeaseCache(tmp_path, B), revision=2)
    one, other = reload(tmp_path), reload(tmp_path, instance=B)
    assert one is not None
    assert other is not None
    assert (one.revision, other.revision) == (1, 2)
    assert reload(tmp_path, instance=C) is None


def test_only_root_may_read(tmp_path: Path) -> None:
    memory = LeaseCache(tmp_path / "new" / "er", ONE)
    memory.identity()
    save(memory)
    for path in (tmp_path / "new" / "er").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


# Age


def age_of(directory: Path) -> float:
    found = reload(directory)
    assert found is not None
    return found.age_s


def test_age_is_in_the_file_and_a_touch_makes_it_no_younger(tmp_path: Path) -> None:
    memory = LeaseCache(tmp_path, ONE)
    save(memory, synced_at=time.time() - 1000)
    assert age_of(tmp_path) == pytest.approx(1000, abs=60)
    os.utime(lease_file(tmp_path))
    assert age_of(tmp_path) == pytest.approx(1000, abs=60)


def test_age_of_a_file_of_before_0_2_is_that_of_its_last_change(tmp_path: Path) -> None:
    old = {name: value for name, value in document(tmp_path).items() if name != "confirmed"}
    path = lease_file(tmp_path)
    path.write_text(json.dumps(old))
    os.utime(path, (time.time() - 1000,) * 2)
    assert age_of(tmp_path) == pytest.approx(1000, abs=60)


def test_what_was_confirmed_is_as_new_as_what_was_saved(tmp_path: Path) -> None:
    memory = LeaseCache(tmp_path, ONE)
    save(memory, synced_at=time.time() - 1000)
    before = json.loads(lease_file(tmp_path).read_text())
    assert memory.confirm()
    assert age_of(tmp_path) < 60
    after = json.loads(lease_file(tmp_path).read_text())
    assert after.pop("confirmed") > before.pop("confirmed")
    assert after == before


@pytest.mark.parametrize("change", ["replaced", "removed", "of another process"])
def test_only_what_was_saved_last_is_confirmed(tmp_path: Path, change: str) -> None:
    memory = LeaseCache(tmp_path, ONE)
    save(memory, synced_at=time.time() - 1000)
    path = lease_file(tmp_path)
    if change == "replaced":
        text = path.read_text()
        path.unlink()
        path.write_text(text)
    elif change == "removed":
        path.unlink()
    else:
        memory = LeaseCache(tmp_path, ONE)  # has saved nothing yet
    assert not memory.confirm()
    if change != "removed":
        assert age_of(tmp_path) > 900
    save(memory)
    assert memory.confirm()


def test_what_could_not_be_saved_is_not_confirmed(tmp_path: Path) -> None:
    """A full disk: the file of before is still there, and its leases are old."""
    memory = LeaseCache(tmp_path, ONE)
    save(memory, synced_at=time.time() - 1000)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory_module, "write_atomically", full)
        assert not save(memory, revision=78)
        assert "No space left on device" in memory.error
        assert not memory.confirm()
    assert age_of(tmp_path) > 900
    assert save(memory, revision=78)
    assert memory.error == ""
    assert age_of(tmp_path) < 60


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_node_id_that_could_not_be_written_is_owed(tmp_path: Path) -> None:
    """With the next id, the leases saved under this one would be a clone's."""
    directory = tmp_path / "state"
    directory.write_text("in the way")
    memory = LeaseCache(directory, ONE)
    made = memory.identity()
    assert not memory.pay()
    directory.unlink()
    save(memory)
    assert str(directory) in memory.error, "the leases are saved, and the id is not"
    assert memory.pay()
    assert memory.error == ""
    assert LeaseCache(directory, ONE).identity() == made


def test_a_node_id_that_another_instance_has_written_meanwhile_stays(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    directory.write_text("in the way")
    memory = LeaseCache(directory, ONE)
    memory.identity()
    directory.unlink()
    theirs = LeaseCache(directory, B).identity()
    assert memory.pay()
    assert memory.error == ""
    assert LeaseCache(directory, B).identity() == theirs


def test_leases_are_made_text_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of thousands of them, saved every ten seconds while any of them changes."""
    made: list[LeaseAttributes] = []
    encode = codec.encode_value

    def counted(attributes: LeaseAttributes) -> str:
        made.append(attributes)
        return encode(attributes)

    monkeypatch.setattr(codec, "encode_value", counted)
    memory = LeaseCache(tmp_path, ONE)
    leases = [lease(key, attributes) for key, attributes in ATTRIBUTES.items()]
    save(memory, leases=leases)
    changed = lease("10.5.3.7-24", LeaseAttributes(public_ip=IPv4Address("192.0.2.9")))
    save(memory, leases=[*leases[:-1], changed])
    assert len(made) == len(leases) + 1
    found = reload(tmp_path)
    assert found is not None
    assert [each.attributes for each in found.leases] == [
        *(each.attributes for each in leases[:-1]),
        changed.attributes,
    ]


def test_a_clock_set_back_makes_no_negative_age(tmp_path: Path) -> None:
    save(LeaseCache(tmp_path, ONE), synced_at=time.time() + 1000)
    assert age_of(tmp_path) == 0


def test_confirming_what_was_never_saved_makes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LeaseCache(tmp_path, ONE).confirm()
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == []


# What is on disk may be anything


def document(tmp_path: Path) -> dict[str, Any]:
    save(LeaseCache(tmp_path, ONE))
    return dict(json.loads((lease_file(tmp_path)).read_text()))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x00" * 4096,
        b"\xff\xfe",
        b"{",
        b"null",
        b"[]",
        b'"leases"',
        b"{}",
        b'{"schema": 1}',
        b'{"schema": 1, "store": "etcd:/a"}',
        b"1e400",
        b"NaN",
    ],
)
def test_what_is_no_memory_is_none(tmp_path: Path, text: bytes) -> None:
    (lease_file(tmp_path)).write_bytes(text)
    assert reload(tmp_path) is None


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_cache_file_cut_short_is_no_cache(
    tmp_path: Path, part: float, caplog: pytest.LogCaptureFixture
) -> None:
    save(LeaseCache(tmp_path, ONE))
    path = lease_file(tmp_path)
    text = path.read_text().rstrip()
    path.write_text(text[: int(len(text) * part)])
    assert reload(tmp_path) is None
    assert len(caplog.messages) == 1
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": "1"},
        {"schema": None},
        {"store": None},
        {"store": ["etcd:/a"]},
        {"own": None},
        {"own": 5},
        {"own": "rubbish"},
        {"own": {}},
        {"leases": None},
        {"leases": []},
        {"leases": "x"},
        {"leases": {"rubbish": "{}"}},
        {"leases": {"10.5.1.0-24": None}},
        {"leases": {"10.5.1.0-24": {"PublicIP": "192.0.2.1"}}},
        {"leases": {"10.5.1.0-24": "rubbish"}},
        {"leases": {"10.5.1.0-24": '{"PublicIP": "x"}'}},
        {"revision": None},
        {"revision": "x"},
        {"revision": []},
        {"revision": float("nan")},
        {"revision": float("inf")},
    ],
    ids=str,
)
def test_a_cache_file_of_another_schema_is_no_cache(tmp_path: Path, changes: Any) -> None:
    text = json.dumps(document(tmp_path) | changes)
    (lease_file(tmp_path)).write_text(text)
    assert reload(tmp_path) is None


@pytest.mark.parametrize("missing", ["schema", "store", "api", "network_config", "own", "leases"])
def test_a_cache_file_without_a_part_is_no_cache(tmp_path: Path, missing: str) -> None:
    text = json.dumps({k: v for k, v in document(tmp_path).items() if k != missing})
    (lease_file(tmp_path)).write_text(text)
    assert reload(tmp_path) is None


@pytest.mark.parametrize("name", [lease_file(Path()).name, "node-id"])
def test_a_cache_file_nested_too_deep_is_no_cache(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 200_000)
    assert reload(tmp_path) is None
    assert LeaseCache(tmp_path, ONE).identity().node_id


def test_a_directory_in_the_files_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (lease_file(tmp_path)).mkdir()
    memory = LeaseCache(tmp_path, ONE)
    assert memory.load("etcd:/a", NODE_ID) is None
    save(memory)
    assert lease_file(tmp_path).name in caplog.text
    assert (lease_file(tmp_path)).is_dir()
    assert os.listdir(tmp_path) == [lease_file(tmp_path).name]


# The node's id


def test_the_id_is_kept(tmp_path: Path) -> None:
    first = LeaseCache(tmp_path, ONE).identity()
    assert len(first.node_id) == 16
    assert first.host == socket.gethostname()
    assert LeaseCache(tmp_path, ONE).identity() == first
    # Another instance of the host is another node, always the same one.
    second = LeaseCache(tmp_path, B).identity()
    assert second.node_id.startswith(f"{first.node_id}-")
    assert LeaseCache(tmp_path, B).identity() == second
    assert LeaseCache(tmp_path, C).identity() != second
    assert LeaseCache(tmp_path / "other", ONE).identity().node_id != first.node_id


def test_a_new_host_name_is_no_new_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = LeaseCache(tmp_path, ONE).identity()
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
    again = LeaseCache(tmp_path, ONE).identity()
    assert (again.node_id, again.host) == (first.node_id, "renamed")


def test_a_clone_is_another_node(
    tmp_path: Path, machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = LeaseCache(tmp_path, ONE).identity()
    machine("fedcba9876543210fedcba9876543210")
    clone = LeaseCache(tmp_path, ONE).identity()
    assert clone.node_id != first.node_id
    assert "clone" in caplog.text
    caplog.clear()
    assert LeaseCache(tmp_path, ONE).identity() == clone
    assert caplog.messages == []


@pytest.mark.parametrize("text", [None, "", "é"])
def test_an_id_without_a_machine_id_is_kept(tmp_path: Path, machine: Any, text: str | None) -> None:
    machine(text)
    first = LeaseCache(tmp_path, ONE).identity()
    assert LeaseCache(tmp_path, ONE).identity() == first
    machine("fedcba9876543210fedcba9876543210")
    assert LeaseCache(tmp_path, ONE).identity() == first


def test_the_machine_id_itself_is_written_nowhere(tmp_path: Path) -> None:
    LeaseCache(tmp_path, ONE).identity()
    assert "0123456789abcdef" not in (tmp_path / "node-id").read_text()


@pytest.mark.parametrize(
    "text",
    ["", "7c1f", "[]", "{}", '{"NodeID": ""}', '{"NodeID": 5, "Machine": ""}', '{"NodeID": "a"}',
     '{"NodeID": ["a"], "Machine": ""}', '{"NodeID": "a", "Machine": []}'],
)  # fmt: skip
def test_an_id_that_cannot_be_read_is_made_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "node-id").write_text(text)
    made = LeaseCache(tmp_path, ONE).identity()
    assert len(made.node_id) == 16
    assert LeaseCache(tmp_path, ONE).identity() == made


# Where nothing can be kept


def test_without_a_directory_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    memory = LeaseCache(None, ONE)
    assert memory.lease_file is None
    save(memory)
    memory.confirm()
    assert memory.load("etcd:/a", NODE_ID) is None
    assert memory.identity() != memory.identity()
    assert caplog.messages == []


def test_an_unwritable_directory_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    # Root may write anywhere but here.
    memory = LeaseCache(Path("/proc/tundp-test"), ONE)
    assert memory.load("etcd:/a", NODE_ID) is None
    assert len(memory.identity().node_id) == 16
    for _ in range(3):
        save(memory)
        memory.confirm()
    (line,) = caplog.messages
    assert "/proc/tundp-test" in line
    assert "a stranger to its own lease" in line


def test_a_second_failure_within_a_minute_is_in_the_status_and_not_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    directory = tmp_path / "state"
    memory = LeaseCache(directory, ONE)
    directory.write_text("in the way")
    save(memory)
    save(memory)
    assert sum("cannot write" in line for line in caplog.messages) == 1
    directory.unlink()
    save(memory)
    assert memory.load("etcd:/a", NODE_ID) is not None
    assert memory.error == ""
    assert "working again" in caplog.messages[-1]
    (lease_file(directory)).unlink()
    directory.rmdir()
    directory.write_text("in the way again")
    save(memory)
    assert sum("cannot write" in line for line in caplog.messages) == 2, caplog.messages
    assert str(directory) in memory.error
