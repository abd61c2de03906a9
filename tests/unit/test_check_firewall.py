"""`config check` says of the firewall's programs what they do when they are run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tundp.daemon.checks import firewall
from tundp.daemon.unit import Unit
from tundp.finding import Finding, Verdict
from tundp.linux import command

NFT = "iptables v1.8.9 (nf_tables)"
LEGACY = "iptables v1.8.9 (legacy)"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with an iptables."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(command, "SYSTEM_PATH", "")
    return tmp_path


def install(programs: Path, says: str = NFT, **scripts: str) -> None:
    for name in ("iptables", "iptables-save", "iptables-restore"):
        text = scripts.get(name.replace("-", "_"), f"echo '{says}'")
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)


async def found(**changes: Any) -> list[Finding]:
    settings = {"ip_masq": False, "iptables_forward_rules": True} | changes
    inspection: Any = SimpleNamespace(settings=SimpleNamespace(**settings), network_config=None)
    return [each async for each in firewall.check_firewall(inspection)]


async def test_ok_is_what_was_run(programs: Path) -> None:
    listing = f"case $1 in --version) echo '{NFT}';; *) echo '-A FORWARD -j ACCEPT';; esac"
    install(programs, iptables_save=listing)
    (finding,) = await found()
    assert finding.verdict is Verdict.OK
    assert (
        finding.evidence == "iptables v1.8.9 (nf_tables), -save and -restore run; it lists 1 rules"
    )


@pytest.mark.parametrize(
    ("scripts", "said"),
    [
        ({"iptables": "echo 'cannot load' >&2; exit 1"}, "cannot load"),
        ({"iptables_restore": "exit 127"}, "iptables-restore --version failed with exit code 127"),
        (
            {"iptables_save": f"[ $1 ] && echo '{NFT}' || {{ echo 'no lock' >&2; exit 4; }}"},
            "no lock",
        ),
        ({"iptables_restore": f"echo '{LEGACY}'"}, "what one makes the other does not see"),
        ({"iptables": "echo something else"}, "names no version"),
    ],
)
async def test_what_does_not_run_is_no_ok(
    programs: Path, scripts: dict[str, str], said: str
) -> None:
    install(programs, **scripts)
    (finding,) = await found()
    assert finding.verdict is Verdict.WARN
    assert said in finding.evidence
    assert "--iptables-forward-rules=false" in finding.next_step


async def test_without_iptables_nft_is_offered(programs: Path) -> None:
    (finding,) = await found()
    assert "there is no iptables here" in finding.evidence
    assert "EnableNFTables" not in finding.next_step
    (programs / "nft").write_text("#!/bin/sh\n")
    (programs / "nft").chmod(0o755)
    (finding,) = await found()
    assert '"EnableNFTables": true' in finding.next_step


@pytest.mark.parametrize(
    ("says", "capabilities", "count"),
    [
        (LEGACY, frozenset({"CAP_NET_ADMIN"}), 2),
        (LEGACY, frozenset({"CAP_NET_ADMIN", "CAP_NET_RAW"}), 1),
        (LEGACY, None, 1),
        (NFT, frozenset({"CAP_NET_ADMIN"}), 1),
    ],
)
async def test_a_unit_that_takes_what_legacy_iptables_needs(
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    capabilities: frozenset[str] | None,
    count: int,
) -> None:
    install(programs, says)
    unit = Unit(name="tundp.service", is_strict=True, writable=(), capabilities=capabilities)
    monkeypatch.setattr(firewall, "installed_unit", lambda _: unit)
    findings = await found()
    assert len(findings) == count
    if count == 2:
        assert (findings[1].id, findings[1].verdict) == ("firewall.unit", Verdict.WARN)
        assert "CapabilityBoundingSet=CAP_NET_RAW" in findings[1].next_step


async def test_no_rules_wanted_is_said_of_ours_alone() -> None:
    (finding,) = await found(iptables_forward_rules=False)
    assert finding.evidence == "no rules of ours are wanted"
