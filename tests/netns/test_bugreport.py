"""`tundp bugreport` of real daemons: what is in it, what is not, and what others make of it.

pod1 -- [node1] -- [switch, lease file] -- [node2] -- pod2, as in conftest.py
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shlex
import signal
import subprocess
import tarfile
import urllib.parse
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from tests.netns.machine import TUNDP
from tests.netns.test_capture import pods, readers, shark
from tests.nodes import MakeOverlay, answers, must_run
from tests.unit.test_bad_input import NEEDS_EVENTS, SCHEMA_1, Server, old_daemon
from tests.wait import until
from tundp.lab.lab import processes_in, stop_process
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import PingStream
from tundp.linux.listeners import process_state

NOWHERE = "10.5.254.9"


def command(node: LabNode, path: Path, *words: str) -> tuple[str, ...]:
    """A command line about a node's daemon."""
    which = f"--admin-socket={node.admin_socket}", f"--subnet-file={node.subnet_file}"
    return (TUNDP, "bugreport", *which, "-w", str(path), *words)


def unpacked(path: Path) -> dict[str, bytes]:
    """Member to content, of an archive only its owner may read."""
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        found = {}
        for each in archive:
            assert each.isreg() and each.name.startswith("tundp-bugreport/"), each.name
            file = archive.extractfile(each)
            assert file is not None
            found[each.name.removeprefix("tundp-bugreport/")] = file.read()
    return found


def put(members: dict[str, bytes], name: str, folder: Path) -> str:
    """A member as a file of its own; its path."""
    path = folder / name.replace("/", "-")
    path.write_bytes(members[name])
    return str(path)


def manifest_of(members: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, str]]:
    """The manifest, and the reason of each member that is missing."""
    manifest = json.loads(members["manifest.json"])
    return manifest, {each["name"]: each["reason"] for each in manifest["missing"]}


# Secrets

SECRETS = {
    "flag of the daemon": "Flag!pass/word1",
    "a variable of this shell": "shellVar+pass2",
    "a URL in a variable": "Url@pass#3",
    "variables of the unit": "unit pass 4",
    "the settings file": 'toml"pass5',
    "a key file": "MIIEvKEYFILE6",
    "a token in the log": "QkFTRTY0dG9rZW43",
    "a header in the log": "dXNlcjpoZWFkZXI4",
    "simple token": "AbCdEfGhIjKlMnOp.99",
    "a JSON web token": "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl10",
    "network config": "configPassword11",
    "a lease": "leaseToken12",
}


def forms(secret: str) -> Iterable[str]:
    """A secret as texts may hold it."""
    yield secret
    yield json.dumps(secret)[1:-1]
    yield urllib.parse.quote(secret)
    yield urllib.parse.quote(secret, safe="")
    yield urllib.parse.quote_plus(secret)
    yield "".join(f"%{byte:02x}" for byte in secret.encode())
    yield base64.b64encode(secret.encode()).decode()
    yield base64.b64encode(f"root:{secret}".encode()).decode()
    yield secret.encode().hex()


def plant(one: LabNode, folder: Path) -> dict[str, str]:
    """Put each secret where it may be in real life; the variables of the report's shell."""
    flag, unit = SECRETS["flag of the daemon"], SECRETS["variables of the unit"]
    log = [
        f"D tundp.store: request with token={SECRETS['a token in the log']} refused",
        f"D etcd: Authorization: Basic {SECRETS['a header in the log']}",
        f"E etcd: auth: invalid auth token {SECRETS['simple token']}",
        f'{{"level":"warn","jwt":"{SECRETS["a JSON web token"]}"}}',
        *(f"E other: tried {form} again" for form in forms(flag)),
        "E evil: \x1b]0;title\x07 and \x1b[2Jclear",
    ]
    with one.log_path.open("a") as file:
        file.write("\n".join([*log, ""]))
    (folder / "key.pem").write_text(
        f"-----BEGIN PRIVATE KEY-----\n{SECRETS['a key file']}\n-----END PRIVATE KEY-----\n"
    )
    (folder / "default").write_text(
        f"FLANNELD_ETCD_USERNAME=root\nFLANNELD_ETCD_PASSWORD='{unit}'\n"
        f"FLANNELD_ETCD_KEYFILE={folder}/key.pem\nFLANNELD_ETCD_CERTFILE={folder}/key.pem\n"
    )
    password = json.dumps(SECRETS["the settings file"])
    (folder / "tundp.toml").write_text(f'v = 1\netcd-username = "root"\netcd-password = {password}')
    proxy = urllib.parse.quote(SECRETS["a URL in a variable"], safe="")
    return {
        "BACKUP_PASSWORD": SECRETS["a variable of this shell"],
        "HTTPS_PROXY": f"http://me:{proxy}@192.0.2.99:3128",
    }


async def test_no_secret_is_in_it(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """Twelve kinds planted; each member searched for each form of each."""
    flags = ("--etcd-username=root", f"--etcd-password={SECRETS['flag of the daemon']}")
    async with make_overlay(*flags, nodes=1) as overlay:
        one = overlay.nodes[1]
        more = plant(one, tmp_path)
        document = json.loads(overlay.lease_file.read_text())
        document["config"]["Password"] = SECRETS["network config"]
        value = {"PublicIP": "192.0.2.77", "Token": SECRETS["a lease"]}
        document["leases"]["10.5.177.0-24"] = value
        overlay.lease_file.write_text(json.dumps(document))
        comment = json.dumps(f"not {SECRETS['flag of the daemon']}")
        await must_run(one.host, "nft", f"add table inet planted {{ comment {comment}; }}")
        paths = [tmp_path / "running.tar.gz", tmp_path / "file.tar.gz"]
        given = (f"--env-file={tmp_path}/default", f"--config={tmp_path}/tundp.toml",
                 f"--store=file:{overlay.lease_file}")  # fmt: skip
        for path, extra in zip(paths, ((), given), strict=True):
            if extra:  # the unit's password is known by now
                with one.log_path.open("a") as file:
                    for form in forms(SECRETS["variables of the unit"]):
                        file.write(f"E other: tried {form} again\n")
            argv = command(one, path, "--no-capture", *extra)
            done = await one.host.run(*argv, environment=more)
            assert done.returncode == 0, done.stderr
            members = unpacked(path)
            assert {"README.txt", "manifest.json", "doctor.json", "store/leases.json"} <= set(
                members
            )
            everything = b"\n".join(
                [*members.values(), done.stderr.encode(), *map(str.encode, members)]
            )
            for name, secret in SECRETS.items():
                for form in forms(secret):
                    assert form.encode() not in everything, (name, form)
                    # Most of it is as bad: what is in base64 ends within other bytes.
                    assert form.rstrip("=")[1:-1].encode() not in everything, (name, form)
            assert b"***" in members["log/stderr.txt"]
            assert b"\x1b" not in everything
        assert b"planted" in members["host/nft-ruleset.txt"], "the rules were looked at"
        assert b"tried *** again" in members["log/stderr.txt"]
        assert f'etcd-keyfile = "{tmp_path}/key.pem"'.encode() in members["config/settings.toml"]


# What is in it


async def test_offline_with_pseudonyms(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """No real address anywhere, and replay, blackbox, explain and tshark read their members."""
    async with pods(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        real, hidden = tmp_path / "real.tar.gz", tmp_path / "hidden.tar.gz"
        async with PingStream(one.pod, two.pod_address, pause_s=0.05):
            talking = asyncio.create_task(_talk(one))
            try:
                for path, more in ((real, ()), (hidden, ("--redact-addresses",))):
                    done = await one.host.run(*command(one, path, "--for=2s", *more))
                    assert done.returncode == 0, done.stderr
            finally:
                talking.cancel()
        assert await readers(one) == 0
        members = unpacked(hidden)
        _, missing = manifest_of(members)
        assert "daemon/status.json" not in missing and "capture/packets.pcapng" not in missing
        subnets = [each.gateway.network for each in (one, two)]
        _no_address(members, one, two)
        # The lease table still makes sense: two /24 in one /16, each packet judged by it.
        ledger = json.loads(members["daemon/ledger.json"])
        network = IPv4Network(ledger["network"])
        named = [IPv4Network(each["subnet"]) for each in ledger["leases"]]
        assert len(named) == 2 and all(each.subnet_of(network) for each in named)
        assert not {*map(str, named)} & {*map(str, subnets)}
        packets = put(members, "capture/packets.pcapng", tmp_path)
        leases = put(members, "daemon/ledger.json", tmp_path)
        made = await must_run(
            one.host, TUNDP, "replay", packets, f"--leases={leases}", "-o", "json"
        )
        verdicts = json.loads(made)["summary"]
        assert verdicts.get("encap forward", 0) > 0 and verdicts.get("decap deliver", 0) > 0, (
            verdicts
        )
        assert verdicts.get("encap reply no_route", 0) > 0, verdicts
        rows = shark(
            Path(packets), "frame.comment", "ip.checksum.status", "frame.cap_len",
            more=["-o", "ip.check_checksum:TRUE"],
        )  # fmt: skip
        assert {row[1] for row in rows} == {"1"}
        assert max(int(row[2]) for row in rows) <= 28 + 28, "headers of a ping, inside and outside"
        shown = await must_run(
            one.host, TUNDP, "blackbox", f"--file={put(members, 'daemon/blackbox.json', tmp_path)}"
        )
        assert "encap drop no_route" in shown and NOWHERE not in shown
        # The same of the real ones, on a host that has the daemon's links.
        members = unpacked(real)
        assert one.public_ip.encode() in members["host/ip-addr.txt"]
        store = put(members, "store/leases.json", tmp_path)
        done = await one.host.run(
            TUNDP, "explain", one.pod_address, two.pod_address, f"--store=file:{store}", "--json",
            f"--subnet-file={one.subnet_file}", "--iface=eth0", f"--state-dir={one.state_dir}",
        )  # fmt: skip
        steps = json.loads(done.stdout)
        assert f"{two.gateway.network}" in done.stdout and two.public_ip in done.stdout, done.stderr
        assert "lease file" in steps["leases_of"]


async def _talk(node: LabNode) -> None:
    """Packets of the pod that are dropped."""
    while True:
        await answers(node.pod, NOWHERE, timeout_s=0.1)
        await asyncio.sleep(0.05)


def _no_address(members: dict[str, bytes], one: LabNode, two: LabNode) -> None:
    addresses = [
        *(each.public_ip for each in (one, two)),
        *(str(each.gateway.ip) for each in (one, two)),
        *(each.pod_address for each in (one, two)),
        *(each.tunnel_address for each in (one, two)),
        NOWHERE,
    ]
    for name, data in members.items():
        for address in addresses:
            found = re.search(rb"(?<![\d.])" + re.escape(address.encode()) + rb"(?![\d])", data)
            assert found is None, (
                name,
                address,
                data[max(0, found.start() - 80) : found.end() + 20],
            )
            if name.endswith(".pcapng"):
                assert IPv4Address(address).packed not in data, (name, address)
            assert IPv4Address(address).packed.hex().encode() not in data, (name, address)
        # Link addresses of the two veth ends.
        for mac in _macs(one):
            assert mac.encode() not in data, (name, mac)
    nodename = os.uname().nodename.encode()
    if len(nodename) > 5:
        assert not [name for name, data in members.items() if nodename in data]


def _macs(node: LabNode) -> list[str]:
    done = subprocess.run(
        ["ip", "-n", node.host.namespace, "-o", "link"], capture_output=True, text=True, check=True
    )
    found = re.findall(r"link/ether (\S+)", done.stdout)
    assert found
    return found


# Where something is in the way


async def test_without_a_daemon_root_or_programs(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """A killed daemon's recorder is there; what fails, hangs or is forbidden is named."""
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        await must_run(one.host, "ip", "route", "get", "10.5.200.1")
        await answers(one.host, NOWHERE, timeout_s=0.2)
        await one.stop_daemon(signal.SIGKILL)
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, does in (
            ("ss", f"sleep 4321 & echo $! >{tmp_path}/hung; wait"),
            ("tc", "printf '\\033[2Jno\\n' >&2; exit 3"),
        ):
            (programs / name).write_text(f"#!/bin/sh\n{does}\n")
            (programs / name).chmod(0o755)
        path = tmp_path / "dead.tar.gz"
        search = {"PATH": f"{programs}:{os.environ['PATH']}"}
        store = f"--store=file:{overlay.lease_file}"
        done = await one.host.run(*command(one, path, store), environment=search)
        assert done.returncode == 0, done.stderr
        members = unpacked(path)
        manifest, missing = manifest_of(members)
        assert manifest["daemon"] == "none answers"
        assert "no daemon answers" in missing["daemon/status.json"]
        assert "was stopped: it took more than 8 s" in missing["host/ss-udp.txt"]
        assert re.search(r"exit code 3: .*no", missing["host/tc-qdisc.txt"])
        assert "\x1b" not in json.dumps(missing)
        for name, reason in missing.items():
            assert f"{name}: " in done.stderr and name in members["MISSING.txt"].decode()
            assert "bug" not in reason, (name, reason)
        assert b"encap drop no_route" not in members["daemon/blackbox.json"]
        assert b"no_route" in members["daemon/blackbox.json"]
        assert "10.5.0.0/16" in members["store/leases.json"].decode()
        hung = int((tmp_path / "hung").read_text())
        assert process_state(hung) in ("", "Z"), "what a program started is ended with it"

        path = tmp_path / "nobody" / "x.tar.gz"
        path.parent.mkdir()
        os.chmod(tmp_path, 0o755)
        os.chown(path.parent, 65534, 65534)
        for each in tmp_path.parents:
            if each.owner() == "root" and len(each.parts) > 2:
                each.chmod(each.stat().st_mode | 0o001)
        done = await one.host.run(
            *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
            *command(one, path, "--no-capture", store),
        )
        assert done.returncode == 0, done.stderr
        manifest, missing = manifest_of(unpacked(path))
        assert manifest["user_id"] == 65534
        assert "host/nft-ruleset.txt" in missing
        assert not any("bug" in reason for reason in missing.values()), missing


async def test_a_full_disk_and_signals_leave_nothing(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        folder = tmp_path / "full"
        folder.mkdir()
        line = shlex.join(command(one, folder / "x.tar.gz", "--no-capture"))
        mount = f"mount -t tmpfs -o size=8k none {folder}"
        script = f"{mount} && {line}; code=$?; ls -A {folder}; exit $code"
        done = await one.host.run("unshare", "--mount", "sh", "-c", script)
        assert done.returncode == 1
        assert done.stdout == "", "no part of it is left"
        assert "No space left on device; the report has " in done.stderr
        assert "nothing of it is left" in done.stderr and "Traceback" not in done.stderr

        for number in (signal.SIGTERM, signal.SIGINT):
            with (tmp_path / "said").open("wb") as log:
                process = await one.host.popen(command(one, folder / "y", "--for=60s"), log=log)
            try:

                async def is_capturing() -> bool:
                    return await readers(one) == 2

                await until(is_capturing, "the report to capture")
                process.send_signal(number)
                assert await asyncio.to_thread(process.wait, 60) == 130
            finally:
                await stop_process(process)
            assert "Traceback" not in (tmp_path / "said").read_text()
            assert list(folder.iterdir()) == []

            async def is_alone() -> bool:
                alone = processes_in(one.host.namespace) == [one.daemon.pid]
                return alone and await readers(one) == 0

            await until(is_alone, "nothing of it to run any more")


async def test_to_a_pipe(make_overlay: MakeOverlay) -> None:
    """-w - is the archive alone on standard output; a reader that leaves ends it quietly."""
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        line = shlex.join(command(one, Path("-"), "--no-capture"))
        shell = ("bash", "-o", "pipefail", "-c")
        done = await one.host.run(*shell, f"{line} | base64")
        assert done.returncode == 0, done.stderr
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(done.stdout))) as archive:
            assert "tundp-bugreport/doctor.json" in archive.getnames()
        done = await one.host.run(*shell, f"{line} | head -c 10 >/dev/null")
        assert done.returncode == 0
        assert "Broken pipe" not in done.stderr and "Traceback" not in done.stderr


async def test_an_older_daemon(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """Its status and metrics are there; what it has not got says which version it takes."""
    async with make_overlay(nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        server = Server(one.admin_socket, old_daemon)
        try:
            path = tmp_path / "old.tar.gz"
            store = f"--store=file:{overlay.lease_file}"
            done = await one.host.run(*command(one, path, store, "--for=1s"))
            assert done.returncode == 0, done.stderr
            doctor = await one.host.run(
                TUNDP, "doctor", "--json", store, f"--admin-socket={one.admin_socket}"
            )
        finally:
            await asyncio.to_thread(server.close)
        members = unpacked(path)
        manifest, missing = manifest_of(members)
        assert manifest["daemon"] == "tundp 0.1.0, pid 4242"
        assert json.loads(members["daemon/status.json"]) == SCHEMA_1
        assert members["daemon/metrics.txt"] == b"tundp_ready 1\n"
        names = ("daemon/ledger.json", "daemon/leases.json", "capture/packets.pcapng")
        assert all(NEEDS_EVENTS in missing[name] for name in names), missing
        assert not any("bug" in reason for reason in missing.values()), missing
        assert "it is 0.1.0" in doctor.stdout and "a bug" not in doctor.stdout, doctor.stdout
