"""Parts of a handover: who is killed, whose command line is taken, whose lease is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
from ipaddress import IPv4Address

import pytest

from tundp.daemon.handover.killer import Killer
from tundp.daemon.handover.upgrade import Process, daemon_arguments, read_process, unit_of
from tundp.errors import PlatformError
from tundp.lease import codec
from tundp.lease.claim import ClaimMachine, ClaimRules, LeaseState
from tundp.lease.claim_io import Look, Observed, Renew, WaitUntil, WrittenByAnother
from tundp.lease.identity import Identity, signed
from tundp.lease.model import TTL_UNKNOWN, Lease, LeaseAttributes

ME = Identity("n1", "host", "run1")
KEY = codec.parse_key("10.5.2.0-24")
OFFER = LeaseAttributes(public_ip=IPv4Address("192.0.2.1"), backend_type="udp")


def lease(offer: LeaseAttributes = OFFER, identity: Identity = ME, *, revision: int = 7) -> Lease:
    return Lease(
        key=KEY,
        attributes=signed(offer, identity, offer),
        revision=revision,
        lease_ttl_s=TTL_UNKNOWN,
    )


def machine() -> ClaimMachine:
    return ClaimMachine(ClaimRules(identity=ME, lease_ttl_s=100, margin_s=30), offer=OFFER, key=KEY)


def test_a_lease_that_is_taken_over_is_written_when_it_would_have_been() -> None:
    taken = machine()
    taken.taken_over(lease(), is_held=True, expires_at=100.0, now=10.0)
    assert taken.state is LeaseState.HELD
    assert taken.next(now=10.0) == WaitUntil(70.0)
    taken.apply(Observed(lease()), now=11.0)
    # A renewal by the process before us, seen late: of our own run, so nothing of a stranger's.
    taken.apply(Observed(lease(revision=9)), now=12.0)
    assert not any(isinstance(each, WrittenByAnother) for each in taken.notices)
    assert taken.next(now=12.0) == WaitUntil(70.0)
    assert isinstance(taken.next(now=70.0), Renew)


def test_what_the_lease_says_otherwise_is_written_at_once() -> None:
    other = LeaseAttributes(public_ip=IPv4Address("192.0.2.9"), backend_type="udp")
    taken = machine()
    taken.taken_over(lease(other), is_held=True, expires_at=100.0, now=10.0)
    assert isinstance(taken.next(now=10.0), Renew)


def test_a_lease_that_was_lost_is_looked_for() -> None:
    taken = machine()
    taken.taken_over(lease(), is_held=False, expires_at=None, now=10.0)
    assert taken.state is LeaseState.LOST
    assert isinstance(taken.next(now=10.0), Look)


def test_a_killer_kills_one_process_and_ends() -> None:
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(["sleep", "60"]) as bystander:
        before = sorted(os.listdir("/proc/self/fd"))
        killer = Killer(other.pid)
        try:
            assert not killer.is_dead(0)
            killer.kill()
            assert other.wait(10) == -signal.SIGKILL
            assert killer.is_dead(0)
            assert bystander.poll() is None
        finally:
            killer.close()
            killer.close()
            bystander.kill()
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_killer_of_nobody_says_dead() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
        pid = gone.pid
    killer = Killer(pid)
    killer.kill()
    assert killer.is_dead(0)
    killer.close()


@pytest.mark.parametrize(
    ("words", "arguments", "is_flanneld"),
    [
        (["python3", "-m", "tundp", "run", "--iface=eth0"], ["--iface=eth0"], False),
        (["/opt/python", "/usr/bin/tundp", "run"], [], False),
        (["python3", "/x/tundp/__main__.py", "run", "-v", "1"], ["-v", "1"], False),
        (["python3", "/usr/bin/flanneld", "-iface", "run"], ["-iface", "run"], True),
    ],
)
def test_a_daemons_arguments_are_found(
    words: list[str], arguments: list[str], *, is_flanneld: bool
) -> None:
    assert daemon_arguments(words) == (arguments, is_flanneld)


@pytest.mark.parametrize("is_flanneld", [False, True])
def test_a_successor_is_found_to_be_a_daemon_again(*, is_flanneld: bool) -> None:
    process = Process(
        pid=1, arguments=("--x", "run"), is_flanneld=is_flanneld, environment={}, unit=""
    )
    arguments, again = daemon_arguments(process.successor())
    assert (list(arguments), again) == (["--replace", "--x", "run"], is_flanneld)


def test_no_daemon_is_named() -> None:
    with pytest.raises(PlatformError, match="neither `tundp run` nor flanneld"):
        daemon_arguments(["sleep", "run"])
    with pytest.raises(PlatformError, match="neither"):
        read_process(os.getpid())


@pytest.mark.parametrize(
    ("cgroups", "unit"),
    [
        ("0::/system.slice/tundp.service\n", "tundp.service"),
        ("0::/system.slice/system-tundp.slice/tundp@blue.service\n", "tundp@blue.service"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", ""),
        (
            "2:cpu:/system.slice/docker.service\n1:name=systemd:/system.slice/x.service\n",
            "x.service",
        ),
        ("0::/\n", ""),
        ("", ""),
    ],
)
def test_the_unit_of_a_process_is_found(cgroups: str, unit: str) -> None:
    assert unit_of(cgroups) == unit
