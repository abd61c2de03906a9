"""The commands of README.md and docs/install.md, typed in order on a bare Debian.

Every ```sh block is taken as it stands and run by one bash per document, as root, in a
checkout, in a booted Debian base system (setup/debian.sh) that has nothing of ours. What
differs from a newcomer's machine:

- apt and pip find their files on the disk (/etc/apt/sources.list, /etc/pip.conf) instead of
  downloading them.
- The examples' addresses exist: this node is 192.0.2.1 on eth0, and an etcd serves at 192.0.2.9,
  which in this one network namespace is an address of the same machine.
- `tundp run` in a block goes on in the background, as in another terminal, and is stopped
  (SIGINT) at the end of the document.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.machine import Machine

REPOSITORY = Path(__file__).parents[2]
DEBIAN = REPOSITORY / ".tools" / "debian"
ETCD = REPOSITORY / ".tools" / "bin" / "etcd"
DOCUMENTS = ("README.md", "docs/install.md")
TYPING_S = 1800.0
"""For one document, to end a hang: compiling and the demo take minutes on a busy machine."""
TRANSCRIPT = "/root/transcript"

PREAMBLE = """\
set -eE
trap 'echo "FAILED ($?), line $LINENO: $BASH_COMMAND"' ERR
cd /root/tundp
in_background() {
    "$@" &
    daemon=$!
    until "$1" status 2> /dev/null | grep -q ' held'; do
        kill -0 $daemon
        sleep 0.1
    done
}
"""
ETCD_UNIT = """\
[Service]
Type=notify
ExecStart=/root/etcd --data-dir=/root/etcd.data --listen-client-urls=http://192.0.2.9:2379 \\
    --advertise-client-urls=http://192.0.2.9:2379
"""
# What differs after anybody's work on a Debian: package manager, logs, systemd's own state,
# this test's files.
UNRELATED = re.compile(
    r"/(root|srv|tmp|var/(cache|log|tmp|lib/(apt|dpkg|systemd|ucf|python|polkit-1))"
    r"|run/(systemd|log|udev|user|lock|credentials|host|initctl|mount|adduser|netns)"
    r"|usr/(lib/python3/dist-packages|local/lib/python3[.0-9]*|local/share/ca-certificates)"
    r"|etc/(alternatives|ssl/certs|python3[.0-9]*|systemd/system/tundp-test.target))(/|$)"
    r"|/etc/(ld\.so\.cache|ca-certificates\.conf|mailcap|[^/]*-|\.pwd\.lock|\.updated|pip\.conf)$"
    r"|/usr/(bin|sbin|lib|share|include|libexec)/|/var/\.updated$|__pycache__"
)


def blocks_of(document: str) -> list[tuple[int, str]]:
    """Each ```sh block of a document, with the number of its first line."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    found = re.finditer(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def script_of(document: str) -> str:
    """The blocks as one script; a line in the transcript before each."""
    parts = [PREAMBLE]
    for line, block in blocks_of(document):
        parts.append(f"echo '===== {document}:{line}'\n")
        parts.append(re.sub(r"^(\S*tundp run .*)$", r"in_background \1", block, flags=re.MULTILINE))
    parts.append('[ -z "${daemon-}" ] || { kill -INT $daemon; wait $daemon; }\n')
    return "".join(parts)


def list_files(machine: Machine) -> set[str]:
    # -xdev leaves out /proc, /sys, /dev; /run is a file system of its own.
    printed = machine.run("find", "/", "/run", "-xdev", is_checked=False)
    packaged = machine.run("sh", "-c", "cat /var/lib/dpkg/info/*.list")
    files = set(printed.splitlines()) - set(packaged.splitlines())
    return {path for path in files if not UNRELATED.search(path)}


def describe_network(machine: Machine) -> set[str]:
    """Devices, IPv4 routes and firewall rules: all that tundp makes in the kernel."""
    printed = machine.run(
        "sh",
        "-c",
        "ip -o link show | cut -d : -f 2; ip -4 route show table all;"
        " ! command -v iptables-save > /dev/null || iptables-save | grep ^-",
        is_checked=False,
    )
    return set(printed.splitlines())


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    if not (DEBIAN / "srv" / "stamp").exists():
        pytest.fail(
            "there is no bare Debian in .tools/debian: run setup/debian.sh (make test does)"
        )
    machine = Machine(DEBIAN)
    try:
        files = subprocess.run(
            ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        for name in files.stdout.split("\0"):
            if not (REPOSITORY / name).is_file():
                continue  # deleted, and not yet committed
            target = machine.staged / "root/tundp" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target, follow_symlinks=False)
        shutil.copy(shutil.which("etcd") or ETCD, machine.staged / "root/etcd")
        machine.write("etc/pip.conf", "[global]\nno-index = true\nfind-links = /srv/wheels\n")
        machine.write("etc/systemd/system/etcd-elsewhere.service", ETCD_UNIT)
        for document in DOCUMENTS:
            machine.write(f"root/{document.replace('/', '-')}.sh", script_of(document))
        machine.boot()
        for line in (
            "link add eth0 type veth peer name peer0",
            "address add 192.0.2.1/24 dev eth0",
            "address add 192.0.2.9/32 dev peer0",
            "link set peer0 up",
            "link set eth0 up",
            "route add default via 192.0.2.254",
        ):
            machine.run("ip", *line.split())
        machine.run("systemctl", "start", "etcd-elsewhere")
        yield machine
    finally:
        machine.stop()


def type_in(machine: Machine, document: str) -> str:
    """Run the document's commands; what they print."""
    script = f"/root/{document.replace('/', '-')}.sh"
    environment = (
        "HOME=/root",
        "LANG=C.UTF-8",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "DEBIAN_FRONTEND=noninteractive",
    )
    result = machine.run(
        *("env", "-i", *environment, "bash", "-c"),
        f"timeout {TYPING_S} bash {script} > {TRANSCRIPT} 2>&1; echo $?",
        deadline_s=TYPING_S + 10,
    )
    transcript = machine.run("cat", TRANSCRIPT)
    if result.strip() != "0":
        pytest.fail(
            f"{document}: exit code {result}\n{transcript[-8000:]}\n{machine.log()[-3000:]}"
        )
    return transcript


@pytest.mark.timeout(3 * TYPING_S)
def test_documents_as_typed(machine: Machine) -> None:
    files, network = list_files(machine), describe_network(machine)

    readme = type_in(machine, "README.md")
    assert "all checks passed" in readme
    assert re.search(r"^10\.5\.\d+\.0/24 of 10\.5\.0\.0/16 on flannel0", readme, re.MULTILINE)

    install = type_in(machine, "docs/install.md")
    heads = re.findall(r"^(10\.5\.\d+\.0/24) of 10\.5\.0\.0/16 on flannel0", install, re.MULTILINE)
    assert len(heads) == 2, "tundp status: with etcd, and with the lease file"
    assert heads[1] == "10.5.1.0/24", "the lease file's own lease"
    assert "10.6." in install, "tundp status --all"

    # docs/install.md ends with the uninstallation.
    # The lock is iptables' own, in a folder that a reboot empties, and other programs hold it.
    left = list_files(machine) - files - {"/run/xtables.lock"}
    assert not left, "\n".join(["left behind:", *sorted(left)])
    assert not describe_network(machine) ^ network
    assert machine.run("sh", "-c", "ps -C tundp -o pid,args --no-headers || true") == ""
    keys = machine.run(
        "env", "ETCDCTL_API=3", "etcdctl", "--endpoints=http://192.0.2.9:2379",
        "get", "--prefix", "--keys-only", "/coreos.com/",
    )  # fmt: skip
    assert keys.split() == ["/coreos.com/network-blue/config", "/coreos.com/network/config"]
