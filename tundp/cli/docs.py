"""Documents made from the declarations of flags and commands.

    python -m tundp.cli.docs              write them all below the current directory
    python -m tundp.cli.docs --check      say which are not current; exit code 1 if any is not

systemd/tundp-default, docs/reference.md, docs/man/ and the JSON Schemas of status and drops are
made here and kept in the repository; tests hold them current.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tundp.cli.command import DAEMON_FLAGS, Command
from tundp.cli.output import EXIT_FAILED, EXIT_OK
from tundp.cli.program import COMMANDS, DESCRIPTION, EXAMPLES, NOTES
from tundp.cli.run import FLANNELD
from tundp.doctor import diagnosis
from tundp.doctor.cases import CASES
from tundp.observe import schema
from tundp.settings.declare import Flag, Section, show
from tundp.settings.help import describe
from tundp.settings.settings import FLAGS, Settings
from tundp.settings.show import example_lines

_WIDTH: Final = 88
DEBUGGING: Final = Path("docs/debugging.md")
"""Written by hand, but for the table between these two lines."""
_TABLE: Final = "<!-- made by: python -m tundp.cli.docs -->"
_TABLE_END: Final = "<!-- end of what is made -->"


def main(arguments: Sequence[str]) -> int:
    """Write or check the documents; the exit code."""
    is_check = "--check" in arguments
    stale = [
        name
        for name, text in documents().items()
        if not Path(name).exists() or Path(name).read_text(encoding="utf-8") != text
    ]
    for name in stale:
        print(f"{name}: {'not current' if is_check else 'written'}")
        if not is_check:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(documents()[name], encoding="utf-8")
    return EXIT_FAILED if stale and is_check else EXIT_OK


def documents() -> dict[str, str]:
    """Path below the repository to text."""
    made = {
        "systemd/tundp-default": environment_file(),
        "docs/reference.md": reference(),
        "docs/man/tundp.8": overview_page(),
        "docs/man/tundp.toml.5": file_page(),
        "tundp/observe/status.schema.json": schema.text(),
        "tundp/observe/drops.schema.json": schema.drops_text(),
        "tundp/observe/leases.schema.json": schema.leases_text(),
        "tundp/doctor/doctor.schema.json": diagnosis.schema_text(),
        str(DEBUGGING): debugging_page(),
    }
    made |= {f"tundp/observe/{name}": text for name, text in schema.others().items()}
    for command in (*COMMANDS, FLANNELD):
        name = command.full_name.replace(" ", "-")
        made[f"docs/man/{name}.8"] = command_page(command)
    return made


# The unit's variables


def environment_file() -> str:
    """/etc/default/tundp: every setting as a variable, commented out."""
    lines = [
        "# /etc/default/tundp: settings of tundp.service, as environment variables. Each line is",
        "# commented out and shows the default, or an example where the default is nothing. A flag",
        "# on the command line wins over a variable, a variable over the file of TUNDP_CONFIG.",
        "# FLANNELD_ stands before what flannel has, too, TUNDP_ before tundp's own.",
        "#",
        "# Mode 0600 if there is a password in it. No shell reads this: no $OTHER, no `command`.",
        "# Check it: tundp config check --env-file=/etc/default/tundp",
        "# After a change: systemctl restart tundp.",
        "#",
        "# Made from the declarations of the flags: python -m tundp.cli.docs",
    ]
    for section, flags in _sections(
        [flag for flag in FLAGS if flag.variable and not flag.no_effect]
    ):
        if section is Section.KUBERNETES:
            continue
        lines += ["", f"# --- {section.value}"]
        for flag in flags:
            text = f"{_sentence(flag.help)} {flag.note}".strip()
            if flag.example:
                default = flag.default_words
                text += f" Default: {default}." if default else " Not set by default."
            elif flag.unit:
                text += f" In {flag.unit}."
            lines += ["", *(f"# {line}" for line in _wrapped(text))]
            lines.append(f"#{flag.variable}={flag.example or show(flag.default)}")
    return "\n".join([*lines, ""])


# docs/reference.md


def reference() -> str:
    """Every command and every flag, in Markdown."""
    lines = [
        "# Reference",
        "",
        "Made from the declarations of flags and commands: `python -m tundp.cli.docs`.",
        "",
        "Flags may be written `-flag value`, `-flag=value`, `--flag value` or `--flag=value`;",
        "booleans take a value only with `=`. A flag wins over its environment variable, that over",
        "the file of `--config`, that over the default. An empty variable is one that is not set.",
        "What got into a variable by accident is no error but a warning: a Kubernetes service link",
        "(`tcp://10.96.0.5:8080`) is as if not set; quotes, blanks and line ends are left out,",
        "but not of a password. Anything else that is wrong is an error: exit code 2.",
        "",
        "## Commands",
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    for command in (*COMMANDS, FLANNELD):
        anchor = command.full_name.replace(" ", "-")
        lines.append(f"| [`{command.full_name}`](#{anchor}) | {_cell(command.summary)} |")
    lines += ["", "```", *_prose(NOTES), "```", "", "## Settings of the daemon", ""]
    lines += [
        "Taken by `tundp run`, `flanneld`, `tundp config` and `tundp cleanup`, as variables in",
        "`/etc/default/tundp`, and, named without dashes, in the file of `--config`.",
        "",
    ]
    for section, flags in _sections(FLAGS):
        lines += [f"### {section.value}", "", *_table(flags, is_setting=True), ""]
    for command in (*COMMANDS, FLANNELD):
        lines += [f"## {command.full_name}", "", f"    {command.usage[len('usage: ') :]}", ""]
        lines += [*_prose(command.description), ""]
        if command.own_flags:
            lines += [*_table(command.own_flags, is_setting=False), ""]
        if command.settings:
            lines += [_settings_sentence(command), ""]
        if command.examples:
            lines += [*(f"    {line}" for line in _examples(command.examples)), ""]
        if command.notes:
            lines += [*_prose(command.notes), ""]
    return "\n".join(lines)


def _table(flags: Sequence[Flag], *, is_setting: bool) -> Iterator[str]:
    head = ["flag", "value", "default", "what it does", "since"]
    if is_setting:
        head.insert(1, "variable")
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for flag in flags:
        note = f" {flag.note}" if flag.note else ""
        unit = f" {flag.unit}" if flag.unit else ""
        default = flag.default_text or (f"`{words}`{unit}" if (words := flag.default_words) else "")
        if flag.is_boolean and not default:
            default = "`false`"
        cells = [
            f"`--{flag.name}`",
            f"`{flag.metavar}`" if flag.metavar else "boolean",
            default,
            _sentence(flag.help) + note,
            flag.since,
        ]
        if is_setting:
            cells.insert(1, f"`{flag.variable}`" if flag.variable else "")
        yield f"| {' | '.join(map(_cell, cells))} |"


def _settings_sentence(command: Command[Any]) -> str:
    if len(command.settings) >= len(DAEMON_FLAGS):
        return "Takes every [setting of the daemon](#settings-of-the-daemon)."
    names = ", ".join(f"`--{flag.name}`" for flag in command.settings)
    return f"Of the [settings of the daemon](#settings-of-the-daemon): {names}."


# docs/debugging.md


def debugging_page() -> str:
    """The page as it is, with the table of what `tundp doctor` can name as it must be."""
    text = f"{_TABLE}\n{_TABLE_END}\n"
    if DEBUGGING.exists():
        text = DEBUGGING.read_text(encoding="utf-8")
    before, _, rest = text.partition(_TABLE)
    after = rest.partition(_TABLE_END)[2]
    rows = [f"| `{case.id}` | {_cell(case.cause)} | {_cell(case.mends)} |" for case in CASES]
    table = "\n".join(["| id | cause | what mends it |", "|---|---|---|", *rows])
    return f"{before}{_TABLE}\n\n{table}\n\n{_TABLE_END}{after}"


# Manual pages, in man(7)


def overview_page() -> str:
    """tundp(8)."""
    lines = [*_head("tundp", "8", "overlay network over UDP, flannel's UDP backend done right")]
    lines += [".SH SYNOPSIS", ".B tundp", ".I COMMAND", "[\\fIflags\\fR]", ".SH DESCRIPTION"]
    lines += [_roff(line) for line in _prose(DESCRIPTION)]
    lines += [".SH COMMANDS"]
    for command in COMMANDS:
        lines += [".TP", f".B {_roff(command.name)}", _roff(f"{_sentence(command.summary)}")]
        lines += [f"See \\fB{_page(command)}\\fR(8)."]
    lines += [".SH EXAMPLES", *_roff_examples(EXAMPLES), ".SH EXIT STATUS"]
    lines += [_roff(line) for line in _prose(NOTES.removeprefix("exit codes: "))]
    lines += [".SH FILES"]
    for path, what in (
        ("/etc/default/tundp", "Variables of tundp.service."),
        (show(Settings().subnet_file), "This node's subnet and MTU, for Docker and CNI."),
        (show(Settings().admin_socket), "Where the daemon answers tundp status."),
        (f"{Settings().state_dir}/", "Node id and lease cache."),
    ):
        lines += [".TP", f".I {_roff(path)}", what]
    others = [f"\\fB{_page(command)}\\fR(8)" for command in (*COMMANDS, FLANNELD)]
    lines += [".SH SEE ALSO", ",\n".join([*others, "\\fBtundp.toml\\fR(5)"])]
    return "\n".join([*lines, ""])


def command_page(command: Command[Any]) -> str:
    """tundp-COMMAND(8)."""
    lines = [*_head(_page(command), "8", command.summary), ".SH SYNOPSIS"]
    operands = "".join(f" \\fI{_roff(each)}\\fR" for each in command.operand_words.split())
    lines += [f"\\fB{_roff(command.full_name)}\\fR{operands} [\\fIflags\\fR]", ".SH DESCRIPTION"]
    lines += [_roff(line) for line in _prose(command.description)]
    for title, flags in command.flag_groups():
        lines += [f'.SH "{title.upper()}"']
        for flag in flags:
            lines += [*_roff_flag(flag)]
    if command.settings == DAEMON_FLAGS:
        lines += [".PP", "And every flag of \\fBtundp\\-run\\fR(8), by variable and file, too."]
    if command.examples:
        lines += [".SH EXAMPLES", *_roff_examples(command.examples)]
    if command.notes:
        title = "EXIT STATUS" if command.notes.startswith("exit codes") else "NOTES"
        text = command.notes.partition(": ")[2] if title == "EXIT STATUS" else command.notes
        lines += [f".SH {title}", *(_roff(line) for line in _prose(text))]
    lines += [".SH SEE ALSO", "\\fBtundp\\fR(8),", "\\fBtundp.toml\\fR(5)"]
    return "\n".join([*lines, ""])


def file_page() -> str:
    """tundp.toml(5)."""
    lines = [*_head("tundp.toml", "5", "settings of tundp, for --config"), ".SH DESCRIPTION"]
    lines += [
        "A TOML file of settings: keys are the names of",
        "\\fBtundp\\-run\\fR(8)'s flags without dashes in front. Lists of values may be lists.",
        "Flags and environment variables win over it. \\fBtundp config example\\fR prints the file",
        "below, \\fBtundp config show\\fR one with the settings in force.",
        ".SH SETTINGS",
        ".nf",
        *map(_roff, example_lines()),
        ".fi",
        ".SH SEE ALSO",
        "\\fBtundp\\fR(8),",
        "\\fBtundp\\-run\\fR(8),",
        "\\fBtundp\\-config\\-show\\fR(8)",
    ]
    return "\n".join([*lines, ""])


def _head(name: str, section: str, summary: str) -> Iterator[str]:
    yield '.\\" Made from the declarations of flags and commands: python -m tundp.cli.docs'
    yield f'.TH {name.upper()} {section} "" "tundp" "tundp"'
    # No hyphens inside names of flags and files, no gaps between words.
    yield from (".nh", ".ad l", ".SH NAME")
    yield f"{_roff(name)} \\- {_roff(summary)}"


def _roff_flag(flag: Flag) -> Iterator[str]:
    value = f" \\fI{_roff(flag.metavar)}\\fR" if flag.metavar else ""
    yield ".TP"
    yield f"\\fB\\-\\-{_roff(flag.name)}\\fR{value}"
    yield _roff(describe(flag))


def _roff_examples(examples: Sequence[tuple[str, str]]) -> Iterator[str]:
    for number, (line, does) in enumerate(examples):
        if number:
            yield ".PP"
        yield ".nf"
        yield f"    \\fB{_roff(line)}\\fR"
        yield ".fi"
        if does:
            yield _roff(_sentence(does[0].upper() + does[1:]))


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("^", "\\(ha")
    escaped = escaped.replace("~", "\\(ti").replace("`", "\\(ga")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def _page(command: Command[Any]) -> str:
    return command.full_name.replace(" ", "-")


# Text


def _sections(flags: Sequence[Flag]) -> Iterator[tuple[Section, list[Flag]]]:
    for section in Section:
        if found := [flag for flag in flags if flag.section is section]:
            yield section, found


def _sentence(text: str) -> str:
    if not text.startswith(("etcd", "klog", "tundp")):
        text = text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _prose(text: str) -> list[str]:
    return text.splitlines()


def _examples(examples: Sequence[tuple[str, str]]) -> Iterator[str]:
    for line, does in examples:
        yield f"{line}    # {does}" if does else line


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
