"""`tundp completion`: what a shell needs to complete commands, flags and their values."""

from __future__ import annotations

from tundp.cli.command import Command, Given, NoOptions
from tundp.cli.output import EXIT_OK
from tundp.errors import ConfigError


def completion(given: Given[NoOptions]) -> int:
    """Print the script of a shell."""
    from tundp.cli import shells
    from tundp.cli.program import COMMANDS

    (shell,) = given.operands
    if shell not in shells.SCRIPTS:
        raise ConfigError(f"no completion for {shell!r}: there is {', '.join(shells.SCRIPTS)}")
    print(shells.SCRIPTS[shell](COMMANDS), end="")
    return EXIT_OK


COMMAND = Command(
    name="completion",
    summary="completion of commands, flags and values for bash, zsh or fish",
    description="""\
Print a script that lets a shell complete commands, flags and their values. SHELL is bash,
zsh or fish.""",
    run=completion,
    options=NoOptions,
    operands=("SHELL",),
    examples=(
        (
            "tundp completion bash > /etc/bash_completion.d/tundp",
            "for all users, from the next login",
        ),
        ("source <(tundp completion bash)", "in this shell"),
        ("tundp completion zsh > '/usr/local/share/zsh/site-functions/_tundp'", ""),
        ("tundp completion fish > ~/.config/fish/completions/tundp.fish", ""),
    ),
)
