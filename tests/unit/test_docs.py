"""Documents and completion made from the declarations: current, complete, and usable."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tundp.cli import docs, shells
from tundp.cli.command import Command
from tundp.cli.program import COMMANDS
from tundp.cli.run import FLANNELD, RunCommand
from tundp.settings.declare import flag, flags_of
from tundp.settings.help import flag_lines
from tundp.settings.settings import FLAGS

ROOT = Path(__file__).parents[2]


def test_what_is_in_the_repository_is_current() -> None:
    stale = [
        name
        for name, text in docs.documents().items()
        if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != text
    ]
    assert not stale, "run: python -m tundp.cli.docs"


def test_no_page_is_left_of_a_command_that_is_gone() -> None:
    made = {name for name in docs.documents() if name.startswith("docs/man/")}
    assert {f"docs/man/{path.name}" for path in (ROOT / "docs" / "man").iterdir()} == made


def test_check_names_what_is_not_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    (tmp_path / "docs" / "reference.md").write_text("old")
    capsys.readouterr()
    assert docs.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/reference.md: not current\n"
    assert (tmp_path / "docs" / "reference.md").read_text() == "old"


def test_the_reference_has_every_flag_and_command() -> None:
    text = docs.reference()
    for each in FLAGS:
        assert f"| `--{each.name}` |" in text, each.name
        assert not each.variable or f"| `{each.variable}` |" in text, each.name
    for command in COMMANDS:
        assert f"\n## tundp {command.name}\n" in text
        for each in command.own_flags:
            assert f"| `--{each.name}` |" in text, each.name


def test_every_row_of_a_table_has_its_cells() -> None:
    width = 0
    for line in docs.reference().splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = line.replace("\\|", "").count("|")
        width = width or cells
        assert cells == width, line


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("command", [*COMMANDS, FLANNELD], ids=lambda command: command.full_name)
def test_a_manual_page_is_formatted_without_complaint(command: Command[Any] | RunCommand) -> None:
    page = docs.command_page(command)
    formatted = subprocess.run(
        ["groff", "-ww", "-man", "-Tascii", "-P-c"], input=page, capture_output=True, text=True
    )
    assert (formatted.returncode, formatted.stderr) == (0, "")
    words = re.sub(r".\x08", "", formatted.stdout)  # bold and underlined, by overstriking
    for title, flags in command.flag_groups():
        assert title.upper() in words
        for each in flags:
            assert f"--{each.name}" in words, each.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    window_s: int = flag(
        "window", parse=int, default=3, unit="seconds", help="how long; short", since="0.9.0"
    )
    dry: bool = flag(default=False, help="do nothing", is_flannels=True)
    names: tuple[str, ...] = flag(default=(), metavar="N", help="names", is_repeatable=True)


def test_a_declaration_is_all_a_flag_needs() -> None:
    window, dry, names = flags_of(Declared)
    assert (window.name, window.field, window.variable) == ("window", "window_s", "TUNDP_WINDOW")
    assert (dry.variable, dry.is_boolean, dry.metavar) == ("FLANNELD_DRY", True, "")
    assert (names.name, names.metavar) == ("names", "N")
    assert list(flag_lines([window, dry], 80)) == [
        "  --window SECONDS      how long; short (default: 3 seconds) [TUNDP_WINDOW]",
        "  --dry                 do nothing [FLANNELD_DRY]",
    ]
    assert Declared() == Declared(window_s=3, dry=False, names=())


# Completion


def completed(shell: str, *words: str) -> set[str]:
    """What bash offers for the last of `words`."""
    line = " ".join(f"'{word}'" for word in words)
    program = (
        f"{shell}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _tundp;"
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["tundp", "st"], {"status"}),
        (["tundp", "config", ""], {"show", "check", "example"}),
        (["tundp", "config", "show", "--or"], {"--origin"}),
        (["tundp", "run", "--engine", ""], {"auto", "gso", "mmsg", "simple", "reference"}),
        (["tundp", "run", "-engine", "g"], {"gso"}),
        (["tundp", "run", "--engine", "=", ""], {"auto", "gso", "mmsg", "simple", "reference"}),
        (["tundp", "run", "--engine", "=", "m"], {"mmsg"}),
        (["tundp", "demo", "--store", ""], {"auto", "etcd", "file"}),
        (["tundp", "bench", "--top"], {"--topology"}),
        (["tundp", "bench", ""], {"diff", "restart"}),
        (["tundp", "bench", "diff", "/etc/host"], {"/etc/hosts", "/etc/hostname"}),
        (["tundp", "run", "--config", "/etc/host"], {"/etc/hosts", "/etc/hostname"}),
        (["tundp", "completion", ""], {"bash", "zsh", "fish"}),
        (["flanneld", "--iface-c"], {"--iface-can-reach"}),
    ],
    ids=lambda value: " ".join(sorted(value) if isinstance(value, set) else value),
)
def test_bash_completes(line: list[str], expected: set[str]) -> None:
    found = completed(shells.bash(COMMANDS), *line)
    assert found == expected or (found >= expected and "/etc/hosts" in expected)


def test_bash_completes_every_flag_of_every_command() -> None:
    for command in COMMANDS:
        words = ["tundp", *command.name.split(), "--"]
        expected = {f"--{each.name}" for each in command.flags}
        assert completed(shells.bash(COMMANDS), *words) == expected, command.name


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_scripts(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(shells.SCRIPTS[shell](COMMANDS))
    done = subprocess.run([shell, "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_every_flag(shell: str) -> None:
    text = shells.SCRIPTS[shell](COMMANDS)
    for command in COMMANDS:
        for each in command.flags:
            assert f"--{each.name}" in text or f" -l {each.name} " in text, each.name
