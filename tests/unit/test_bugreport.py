"""What a report may hold: no secret in any form, addresses by one rule, headers only."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import tomllib
import urllib.parse
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from tests.packets import icmp_echo, udp
from tundp.bugreport.archive import FOLDER, Member, Report, write_private
from tundp.bugreport.daemon import origin_items
from tundp.bugreport.packets import headers_len, headers_of, renamed
from tundp.bugreport.pseudonyms import Pseudonyms
from tundp.bugreport.readme import readme
from tundp.bugreport.redact import Redactor
from tundp.bugreport.secrets import Secrets
from tundp.errors import PlatformError
from tundp.settings.sources import load_settings

SECRET = "S3cr&t/pä ss+w0rd"
OVERLAY = IPv4Network("10.5.0.0/16")


def pseudonyms(**more: object) -> Pseudonyms:
    given: dict[str, object] = {"overlay": OVERLAY, "subnet_len": 24} | more
    return Pseudonyms(b"key", **given)  # type: ignore[arg-type]


# Secrets


def shell_quoted(text: str) -> str:
    return re.sub(r"([^A-Za-z0-9])", r"\\\1", text)


@pytest.mark.parametrize(
    "written",
    [
        SECRET,
        urllib.parse.quote(SECRET),
        urllib.parse.quote(SECRET, safe=""),
        urllib.parse.quote_plus(SECRET),
        re.sub("%..", lambda found: found[0].lower(), urllib.parse.quote(SECRET, safe="")),
        "".join(f"%{byte:02X}" for byte in SECRET.encode()),
        json.dumps(SECRET),
        json.dumps(SECRET, ensure_ascii=False),
        "".join(f"\\u{ord(each):04x}" for each in SECRET),
        ascii(SECRET),
        shell_quoted(SECRET),
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
        f"postgres://root:{urllib.parse.quote(SECRET, safe='')}@192.0.2.9/x",
    ],
)
def test_a_known_secret_is_found_however_it_is_written(written: str) -> None:
    secrets = Secrets()
    secrets.add(SECRET, "root")
    hidden = secrets.hide(f"before {written}, after")
    assert hidden.startswith(("before ", "before '", 'before "'))
    assert "after" in hidden
    for part in ("cr", "5333637226742f70", "%53%33", "s3cr", "w0rd"):
        assert part not in hidden.replace("postgres", "").lower()


@pytest.mark.parametrize("before", ["", "a", "ab", "abc", "root:", "user root:"])
@pytest.mark.parametrize("after", ["", "x", "xy", "xyz"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_known_secret_is_found_inside_base64(before: str, after: str, encode: object) -> None:
    secrets = Secrets()
    secrets.add(SECRET)
    assert callable(encode)
    coded = encode(f"{before}{SECRET}{after}".encode()).decode()
    hidden = secrets.hide(f"Header: {coded} end")
    assert "***" in hidden
    assert hidden.endswith(" end")
    # What is left may be decoded to the bytes around, never to five of the secret's in a row.
    for start in range(4):
        for left in hidden.removeprefix("Header: ").removesuffix(" end").split("***"):
            piece = left[start:]
            piece = piece[: len(piece) // 4 * 4]
            decoded = base64.urlsafe_b64decode(piece.replace("+", "-").replace("/", "_"))
            found = decoded.decode(errors="replace")
            assert not any(SECRET[at : at + 5] in found for at in range(len(SECRET) - 4))


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("etcd: token=MTIzNDU2 refused", "MTIzNDU2"),
        ('{"password": "two words"}', "two words"),
        ("Environment=FLANNELD_ETCD_PASSWORD='it is'", "it is"),
        ('etcd-password = "p \\" q"', 'p \\" q'),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("authorization: Bearer abc.def-ghi", "abc.def-ghi"),
        ("--etcd-endpoints=http://u:hunter2@192.0.2.9:2379", "hunter2"),
        ("tundp run --etcd-password hunter2 --iface=eth0", "hunter2"),
        ("jwt eyJhbGciOi.eyJzdWIi.SflKxwRJ here", "SflKxwRJ"),
        ("simple HFgGiWWQOCfhVgEs.42 token", "HFgGiWWQOCfhVgEs"),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcCAQ\n-----END EC PRIVATE KEY-----\n", "MHcCAQ"),
        ("-----BEGIN PRIVATE KEY-----\nMHcCAQ\ncut off here", "MHcCAQ"),
        ('AWS_SECRET_ACCESS_KEY="wJalrXUtnFEMI K7"', "wJalrXUtnFEMI"),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI", "wJalrXUtnFEMI"),
        ("PROXY_PASSPHRASE=hunter22", "hunter22"),
        ("Environment=PGPASS=hunter22", "hunter22"),
        ("NTLM_AUTH=domain\\u:hunter22", "hunter22"),
        ("DB_PWD=hunter22", "hunter22"),
        ("Environment=ETCDCTL_USER=root:hunter22", "hunter22"),
        ("etcdctl --user root:hunter22 get /", "hunter22"),
        ("quiet systemd.set_credential=etcd.key:hunter22 ro", "hunter22"),
        ('quiet "systemd.set_credential=etcd.key:two hunter22" ro', "hunter22"),
        ("systemd.set_credential_binary=etcd.key:aHVudGVyMjI= ro", "aHVudGVyMjI"),
        ("[Service]\nSetCredential=etcd.key:two hunter22\nType=notify", "hunter22"),
        ("SetCredentialEncrypted=etcd.key: \\\n        aHVudGVy\\\n        MjI\n", "MjI"),
    ],
)
def test_an_unknown_secret_is_found_by_its_place(line: str, secret: str) -> None:
    hidden = Secrets().hide(line)
    assert secret not in hidden
    assert "***" in hidden


@pytest.mark.parametrize(
    "line",
    [
        "10.5.1.0/24 via 192.0.2.1 dev eth0",
        "etcd-keyfile = /etc/etcd/key.pem",
        "etcd-username = root",
        "http://192.0.2.9:2379 answers",
        "tokens are renewed; a password is needed",
        "TOKEN_FILE=/run/token PASSWORD_FILE=/run/password",
        "User=nobody\nLoadCredential=etcd.key:/etc/etcd.key\nPassEnvironment=HOME",
        "iommu.passthrough=1 root=/dev/sda1 bypass=2",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert Secrets().hide(line) == line


def test_secrets_are_learnt_from_settings_variables_and_command_lines() -> None:
    secrets = Secrets()
    secrets.add_settings(load_settings(["--etcd-username=u", "--etcd-password=fromflag"], {}))
    secrets.add_variables(
        {
            "FLANNELD_ETCD_PASSWORD": '"fromvar"',
            "GITHUB_TOKEN": "fromtoken",
            "HTTPS_PROXY": "http://user:fromurl%21@192.0.2.9:3128",
            "ETCDCTL_USER": "root:fromuser",
            "PROXY_PASSPHRASE": "fromphrase",
            "PWD": "/root/here",
        }
    )
    secrets.add_arguments(["tundp", "run", "-etcd-password", "fromargs", "--iface=eth0"])
    words = "fromflag fromurl! fromurl%21 fromvar fromtoken fromargs fromuser fromphrase"
    assert secrets.hide(f"{words} eth0 192.0.2.9") == f"{'*** ' * 8}eth0 192.0.2.9"
    assert secrets.hide("/root/here") == "/root/here"


async def test_of_settings_files_only_declared_settings_are_shown(tmp_path: Path) -> None:
    """Whatever another variable is named, it may be a secret."""
    (tmp_path / "env").write_text(
        "# FLANNELD_IFACE=eth0\n# the old one was hunter22\nFLANNELD_ETCD_PASSWORD=hunter22\n"
        "FLANNELD_ETCD_ENDPOINTS=http://192.0.2.9:2379,\\\nhttp://192.0.2.8:2379\n"
        '#FLANNELD_ETCD_PASSWORD=hunter22\nLOGIN = hunter22\nexport ODD="two\nhunter22"\n'
    )
    (tmp_path / "toml").write_text(
        'iface = "eth0" # hunter22\netcd-password = """\nhunter22"""\nlogin = "hunter22"\n'
        'etcd-endpoints = [\n "http://192.0.2.9:2379"]\n[iface-regex]\na = "x"\n[z]\nk="hunter22"'
    )
    (tmp_path / "bad").write_text('iface = "eth0"\nlogin = "hunter22"\nhunter22\n"""hunter22"""')
    shown: list[str] = []
    for env, config in (("env", "toml"), ("env", "bad")):
        items = origin_items(None, tmp_path / env, tmp_path / config)
        found = {each.name: (await each.make()).content for each in items}
        assert set(found) == {"config/default-tundp.txt", "config/config-file.txt"}
        assert not any("hunter22" in text for text in found.values()), found
        shown += found.values()
    assert shown[0].split("\n") == [
        "# FLANNELD_IFACE=eth0",
        "#***",
        "FLANNELD_ETCD_PASSWORD=***",
        "FLANNELD_ETCD_ENDPOINTS=http://192.0.2.9:2379,http://192.0.2.8:2379",
        "#***",
        "LOGIN =***",
        "export ODD=***",
        "***",
        "",
    ]
    assert tomllib.loads(shown[1]) == {
        "iface": "eth0",
        "etcd-password": "***",
        "login": "***",
        "etcd-endpoints": ["http://192.0.2.9:2379"],
        "iface-regex": "***",
        "z": "***",
    }
    assert 'iface = "eth0"\nlogin =***' in shown[3]


def test_members_with_secret_names_are_blanked_and_json_stays_json() -> None:
    redactor = Redactor()
    redactor.secrets.add("1234")
    found = redactor.value(
        {"token": "x", "list": [{"apiKey": "y"}], "count": 1234, "etcd-keyfile": "/k", "t": "a1234"}
    )
    assert found == {
        "token": "***",
        "list": [{"apiKey": "***"}],
        "count": 1234,
        "etcd-keyfile": "/k",
        "t": "a***",
    }


def test_foreign_text_cannot_command_a_terminal() -> None:
    text = Redactor().text("a\x1b]0;title\x07b\rc\tdone\nnext\u202e\n")
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text and "\u202e" not in text
    assert text.split("\n")[1].startswith("next")
    assert "\tdone" in text


LONG_WORDS = (
    "a",
    "token",
    "-eyJ",
    "eyJa-eyJ.",
    "\\",
    "_auth ",
    'token="',
    "user=a:",
    "2001:",
    "::",
)
"""What a peer may write into a lease again and again, which has 1.5 MB at most."""
HIDES = """
import sys
from tundp.bugreport.pseudonyms import Pseudonyms
from tundp.bugreport.redact import Redactor
redactor = Redactor(pseudonyms=Pseudonyms(b"key", hosts=["kube-1"]))
redactor.secrets.add(r"\\abcdef", "root")
print(len(redactor.value({"Note": sys.argv[1] * (200_000 // len(sys.argv[1]))})["Note"]))
"""


@pytest.mark.parametrize("word", LONG_WORDS)
def test_a_long_word_costs_no_more_than_its_length(word: str) -> None:
    """In a process of its own: what takes the square of it would take an hour."""
    argv = [sys.executable, "-c", HIDES, word]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) > 0


def test_a_web_token_is_hidden_wherever_it_begins_in_a_word() -> None:
    hide = Secrets().hide
    assert hide("x-eyJa-b.eyJc.sig-n end") == "x-*** end"
    assert hide("eyJnone eyJone.two eyJa.b.") == "eyJnone eyJone.two ***"
    assert hide("host.eyJa.eyJb.c") == "host.***"


# Pseudonyms


def common(one: int, other: int) -> int:
    """Leading bits two addresses have in common."""
    return 32 - (one ^ other).bit_length()


def test_pseudonyms_keep_common_prefixes_and_are_never_shared() -> None:
    names, rng = pseudonyms(), random.Random(7)
    seen: dict[int, int] = {}
    for _ in range(1500):
        one = rng.getrandbits(32)
        other = one ^ rng.getrandbits(rng.randrange(1, 33))
        mapped = names.ipv4(one), names.ipv4(other)
        assert common(one, other) == common(*mapped)
        for address, pseudonym in zip((one, other), mapped, strict=True):
            assert seen.setdefault(pseudonym, address) == address
    assert Pseudonyms(b"other").ipv4(0xC0000201) != Pseudonyms(b"third").ipv4(0xC0000201)


def test_structure_is_kept_in_text() -> None:
    names = pseudonyms(hosts=["kube-1"])
    text = names.text(
        "10.5.0.0/16 10.5.1.0/24 10.5.1.0-24 10.5.1.0 10.5.1.9 192.168.7.1/24 172.20.1.1"
        " 127.0.0.1 224.0.0.251 0.0.0.0/0 255.255.255.255 KUBE-1 kube-10"
    )
    words = text.split()
    network, subnet = IPv4Network(words[0]), IPv4Network(words[1])
    assert subnet.subnet_of(network) and network.subnet_of(IPv4Network("10.0.0.0/8"))
    assert network != OVERLAY or subnet != IPv4Network("10.5.1.0/24")
    assert words[2] == str(subnet).replace("/", "-")
    assert words[3] == str(subnet.network_address), "the TUN's address is still the first"
    assert IPv4Address(words[4]) == subnet.network_address + 9
    assert words[5].startswith("192.168.") and words[5].endswith(".1/24")
    assert IPv4Address(words[6]) in IPv4Network("172.16.0.0/12")
    assert words[7:11] == ["127.0.0.1", "224.0.0.251", "0.0.0.0/0", "255.255.255.255"]
    assert words[11:] == ["host-1", "kube-10"]
    assert names.text(" ".join(words[7:11])) == " ".join(words[7:11])


def test_ipv6_and_link_addresses_have_pseudonyms() -> None:
    text = pseudonyms().text(
        "link/ether 52:54:00:12:34:56 brd ff:ff:ff:ff:ff:ff inet6 fe80::5054:ff:fe12:3456/64"
        " 2001:db8:1::5 ::1 at 12:34:56"
    )
    assert "52:54" not in text and "5054" not in text and "2001:db8" not in text
    assert "brd ff:ff:ff:ff:ff:ff" in text and "fe80::" in text and text.endswith("::1 at 12:34:56")


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("at 2001:db8::1.", "2001:db8::1"),
        ("2001:db8::1: refused", "2001:db8::1"),
        ("addr:2001:db8::1", "2001:db8::1"),
        ("node:2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]:2379", "2001:db8::1"),
        ("2001:db8::1,2001:db8::1;", "2001:db8::1"),
        ("2001:db8::1.53 >", "2001:db8::1"),
        ("2001:DB8:0:0:0:0:0:1", "2001:db8::1"),
        ("fe80::5054:ff:fe12:3456%eth0:", "fe80::5054:ff:fe12:3456"),
        ("no 1:2:3:4:5:6:7:: there", "1:2:3:4:5:6:7:0"),
    ],
)
def test_an_ipv6_address_has_its_pseudonym_whatever_stands_around(
    written: str, address: str
) -> None:
    names = pseudonyms()
    pseudonym = str(IPv6Address(names.ipv6(int(IPv6Address(address)))))
    given = re.compile("2001:db8:(:|0:0:0:0:0:)1|fe80::[^%]*6|1:2:3:4:5:6:7::", re.IGNORECASE)
    assert given.search(written) and address != pseudonym
    assert names.text(written) == given.sub(pseudonym, written)


@pytest.mark.parametrize("written", ["52:54:00:12:34:56:", "addr:52:54:00:12:34:56", "x 12:34:56"])
def test_a_link_address_has_its_pseudonym_and_a_time_has_none(written: str) -> None:
    names = pseudonyms()
    mac = "52:54:00:12:34:56"
    assert names.text(written) == written.replace(mac, names.mac(mac))


def test_an_ipv4_address_inside_ipv6_has_the_same_pseudonym() -> None:
    """RFC 4291, 2.5.5: ::ffff:203.0.113.9, in whichever way it is written."""
    names = pseudonyms()
    mapped = IPv4Address(names.ipv4(int(IPv4Address("203.0.113.9"))))
    expected = IPv6Address((0xFFFF << 32) | int(mapped))
    found = names.text("::ffff:cb00:7109 ::FFFF:203.0.113.9 [::ffff:cb00:7109]:2379 ::cb00:7109")
    words = re.sub(r"[\[\]]|:2379", "", found).split()
    assert [IPv6Address(each) for each in words[:3]] == [expected] * 3
    assert IPv6Address(words[3]) == IPv6Address(int(mapped))
    assert names.text("::1 :: std::fs::dead") == "::1 :: std::fs::dead"
    assert names.text("64:ff9b::203.0.113.9") == f"64:ff9b::{mapped}"


def test_short_host_names_have_pseudonyms_in_documents_too() -> None:
    redactor = Redactor(pseudonyms=pseudonyms(hosts=["gw", "db"]))
    redactor.secrets.add("tcpx")
    found = redactor.value({"host": "gw", "DB": ["db", "eth", "tcpx"], "udp": "on db"})
    assert found == {"host": "host-1", "host-2": ["host-2", "eth", "***"], "udp": "on host-2"}
    assert redactor.text("gw db") == "host-1 host-2"


# Packets


def header_sum(header: bytes) -> int:
    """The one's-complement sum of a header (RFC 1071), by a loop of this test's own."""
    total = 0
    for (word,) in struct.iter_unpack("!H", header):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_no_payload_is_kept() -> None:
    ends: Any = {"source": "10.5.1.2", "destination": "10.5.2.3"}
    datagram = udp(b"PAYLOAD" * 9, sport=5, dport=53, **ends)
    assert headers_of(datagram) == datagram[:28]
    assert len(headers_of(icmp_echo(b"PAYLOAD", kind=8, **ends))) == 28
    tcp = bytearray(datagram[:20]) + bytes(12) + b"\x80" + bytes(19) + b"PAYLOAD"
    tcp[9] = 6
    assert len(headers_of(tcp)) == 20 + 32
    fragment = bytearray(datagram)
    fragment[6:8] = (5).to_bytes(2, "big")
    assert len(headers_of(fragment)) == 20, "what follows is the middle of a payload"
    for broken in (b"", b"\x45", b"\x60" + bytes(60), b"\x4f" + bytes(30)):
        assert headers_len(broken) == 0


def test_renamed_headers_verify_and_broken_ones_stay_broken() -> None:
    names = pseudonyms()
    ends: Any = {"source": "10.5.1.2", "destination": "192.0.2.3"}
    packet = headers_of(udp(b"x" * 30, sport=5, dport=53, **ends))
    assert header_sum(packet[:20]) == 0xFFFF
    changed = renamed(packet, names)
    assert header_sum(changed[:20]) == 0xFFFF
    assert int.from_bytes(changed[12:16], "big") == names.ipv4(int(IPv4Address("10.5.1.2")))
    assert int.from_bytes(changed[16:20], "big") == names.ipv4(int(IPv4Address("192.0.2.3")))
    assert changed[20:26] == packet[20:26] and changed[26:28] == b"\0\0"
    wrong = bytearray(packet)
    wrong[10] ^= 0x55
    assert header_sum(renamed(bytes(wrong), names)[:20]) != 0xFFFF


def test_addresses_inside_an_icmp_error_are_renamed_too() -> None:
    names = pseudonyms()
    ends: Any = {"source": "10.5.1.2", "destination": "192.0.2.3"}
    quoted = udp(b"x" * 30, sport=5, dport=53, **ends)
    error = bytearray(icmp_echo(quoted, kind=3, source="192.0.2.3", destination="10.5.1.2"))
    kept = headers_of(error)
    assert kept == error[: 28 + 28]
    changed = renamed(kept, names)
    for real in ("10.5.1.2", "192.0.2.3"):
        assert IPv4Address(real).packed not in changed
    assert header_sum(changed[28:48]) == 0xFFFF


# The archive


def report() -> Report:
    versions = {"tundp": "0.2.0"}
    head = {"made": "now", "versions": versions, "daemon": "none", "has_pseudonyms": False}
    found = Report(made_at=1_700_000_000, head=head)
    for name in ("host/z.txt", "doctor.json", "config/a.txt"):
        found.members.append(Member(name=name, about="x", data=name.encode()))
    found.miss("host/nft-ruleset.txt", "there is no nft here\x1b[2J")
    return found


def test_the_archive_is_the_same_each_time_and_in_order() -> None:
    one, other = report(), report()
    other.members.reverse()
    packed = one.pack(readme(one))
    assert packed == other.pack(readme(other))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        names = [each.name.removeprefix(f"{FOLDER}/") for each in archive]
        assert names == [
            "README.txt",
            "MISSING.txt",
            "manifest.json",
            "config/a.txt",
            "doctor.json",
            "host/z.txt",
        ]
        assert {(each.mode, each.uid, each.gid) for each in archive} == {(0o600, 0, 0)}
        member = archive.extractfile(f"{FOLDER}/manifest.json")
        assert member is not None
        manifest = json.load(member)
    (missing,) = manifest["missing"]
    assert missing["name"] == "host/nft-ruleset.txt"
    assert "there is no nft" in missing["reason"] and "\x1b" not in missing["reason"]
    assert [each["bytes"] for each in manifest["members"]] == [12, 11, 10]


def test_a_file_is_written_whole_and_private_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"before")
    path.chmod(0o666)
    write_private(path, b"after")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"after", 0o600)
    with pytest.raises(PlatformError, match=r"cannot write .*/none/a: No such file"):
        write_private(tmp_path / "none" / "a", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlatformError, match=r"cannot write .*folder: Is a directory"):
        write_private(tmp_path / "folder", b"x")
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "folder"]
