"""Completion scripts of bash, zsh and fish, made from the commands' declarations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from tundp.cli.command import Command
from tundp.cli.program import GROUPS
from tundp.settings.declare import Flag

Commands = Sequence[Command[Any]]


def bash(commands: Commands) -> str:
    """For bash, with or without the bash-completion package."""
    return "\n".join([*_bash_lines(commands), ""])


def _bash_lines(commands: Commands) -> Iterator[str]:
    yield "# bash completion for tundp and flanneld; made by `tundp completion bash`"
    yield "_tundp() {"
    yield '    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=""'
    yield '    local first=${COMP_WORDS[1]} flags="" values=""'
    yield "    COMPREPLY=()"
    yield '    [[ ${COMP_WORDS[0]##*/} == flanneld ]] && command="run"'
    yield "    # --flag=value: bash makes three words of it."
    yield "    if [[ $word == = ]]; then word=''; elif [[ $before == = ]]; then"
    yield "        before=${COMP_WORDS[COMP_CWORD-2]}"
    yield "    fi"
    yield '    case "$first ${COMP_WORDS[2]}" in'
    for command in commands:
        if " " in command.name:
            yield f'        "{command.name}") command="{command.name}" ;;'
    yield "    esac"
    yield "    if [[ -z $command && $COMP_CWORD -gt 1 ]]; then command=$first; fi"
    yield "    case $command in"
    yield f'        "") values="{" ".join(_first_words(commands))} help --help --version" ;;'
    for group, words in _second_words(commands).items():
        flags = " ".join(f"--{flag.name}" for flag in _flags_of(commands, group)) or "--help"
        yield f'        {group}) flags="{flags}"; [[ $COMP_CWORD -eq 2 ]] && values="{words}" ;;'
    for command in commands:
        if command.name not in _second_words(commands):
            values = '; values="bash zsh fish"' if command.name == "completion" else ""
            yield f'        "{command.name}") flags="{_words(command.flags)}"{values} ;;'
    yield f'        help) values="{" ".join(_first_words(commands))}" ;;'
    yield "    esac"
    yield '    case "$command ${before/#--/-}" in'
    for (name, choices), users in _choices(commands).items():
        patterns = "|".join(f'"{user} -{name}"' for user in users)
        yield f'        {patterns}) values="{" ".join(choices)}"; flags="" ;;'
    files = "|".join(f'*" -{flag.name}"' for flag in _flags(commands) if flag.takes_file)
    yield f"        {files})"
    yield '            COMPREPLY=($(compgen -f -- "$word")); return ;;'
    yield "    esac"
    yield "    if [[ $word == -* ]]; then values=$flags; elif [[ -z $values && -z $word ]]; then"
    yield "        values=$flags"
    yield "    fi"
    yield '    COMPREPLY=($(compgen -W "$values" -- "$word"))'
    yield '    if [[ $command == "bench diff" && $word != -* ]]; then'
    yield '        COMPREPLY=($(compgen -f -- "$word"))'
    yield "    fi"
    yield "}"
    yield "complete -o filenames -F _tundp tundp flanneld"


def zsh(commands: Commands) -> str:
    """For zsh: a function of the completion system."""
    return "\n".join([*_zsh_lines(commands), ""])


def _zsh_lines(commands: Commands) -> Iterator[str]:
    yield "#compdef tundp flanneld"
    yield "# zsh completion for tundp and flanneld; made by `tundp completion zsh`"
    yield "_tundp() {"
    yield "    local -a commands"
    yield '    local command="$words[2]"'
    yield "    if [[ ${words[1]:t} == flanneld ]]; then"
    yield "        command=run; words=(x run ${words[2,-1]}); (( CURRENT++ ))"
    yield "    fi"
    yield "    if (( CURRENT == 2 )); then"
    yield "        commands=("
    for word, summary in _summaries(commands):
        yield f"            {_quoted(f'{word}:{summary}')}"
    yield "        )"
    yield "        _describe command commands"
    yield "        return"
    yield "    fi"
    yield '    case "$words[2] $words[3]" in'
    for command in commands:
        if " " in command.name:
            yield f'        "{command.name}") (( CURRENT > 3 )) && command="{command.name}" ;;'
    yield "    esac"
    yield "    case $command in"
    for group, words in _second_words(commands).items():
        yield f"        {group})"
        yield f"            if (( CURRENT == 3 )); then compadd -- {words}; fi"
        yield from _zsh_flags(_flags_of(commands, group))
        yield "            ;;"
    for command in commands:
        if command.name not in _second_words(commands):
            yield f'        "{command.name}")'
            if command.name == "completion":
                yield "            compadd -- bash zsh fish"
            if command.name == "bench diff":
                yield "            _files"
            yield from _zsh_flags(command.flags)
            yield "            ;;"
    yield f"        help) compadd -- {' '.join(_first_words(commands))} ;;"
    yield "    esac"
    yield "}"
    yield 'if [[ "$funcstack[1]" == _tundp ]]; then'
    yield '    _tundp "$@"'
    yield "else"
    yield "    compdef _tundp tundp flanneld"
    yield "fi"


def _zsh_flags(flags: Sequence[Flag]) -> Iterator[str]:
    if not flags:
        return
    yield "            _arguments -S \\"
    for flag in flags:
        repeat = "*" if flag.is_repeatable else ""
        text = flag.help.replace("[", "(").replace("]", ")").replace(":", "\\:")
        value = "" if flag.is_boolean else f":{flag.metavar.replace(':', ' ')}:{_zsh_action(flag)}"
        equals = "" if flag.is_boolean else "="
        yield f"                {_quoted(f'{repeat}--{flag.name}{equals}[{text}]{value}')} \\"
    yield "                '*: :'"


def _zsh_action(flag: Flag) -> str:
    if flag.choices:
        return f"({' '.join(flag.choices)})"
    return "_files" if flag.takes_file else ""


def fish(commands: Commands) -> str:
    """For fish."""
    return "\n".join([*_fish_lines(commands), ""])


def _fish_lines(commands: Commands) -> Iterator[str]:
    yield "# fish completion for tundp and flanneld; made by `tundp completion fish`"
    yield "complete -c tundp -f"
    yield "complete -c flanneld -f"
    for word, summary in _summaries(commands):
        yield f"complete -c tundp -n __fish_use_subcommand -a {word} -d {_quoted(summary)}"
    for group, words in _second_words(commands).items():
        yield (
            f"complete -c tundp -n '__fish_seen_subcommand_from {group};"
            f" and not __fish_seen_subcommand_from {words}' -a '{words}'"
        )
    yield "complete -c tundp -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'"
    for command in commands:
        names = command.name.split()
        others = _second_words(commands).get(command.name, "")
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in names)
        if others:
            seen += f"; and not __fish_seen_subcommand_from {others}"
        for flag in command.flags:
            yield _fish_flag(f"complete -c tundp -n '{seen}'", flag)
            if command.name == "run":
                yield _fish_flag("complete -c flanneld", flag)
    yield "complete -c tundp -n '__fish_seen_subcommand_from diff' -F"


def _fish_flag(head: str, flag: Flag) -> str:
    line = f"{head} -l {flag.name}"
    if flag.choices:
        line += f" -x -a '{' '.join(flag.choices)}'"
    elif not flag.is_boolean:
        line += " -r -F" if flag.takes_file else " -x"
    return f"{line} -d {_quoted(flag.help)}"


def _first_words(commands: Commands) -> list[str]:
    return list(dict.fromkeys(command.name.split()[0] for command in commands))


def _second_words(commands: Commands) -> dict[str, str]:
    """The first words of commands of two, and what may follow each."""
    found: dict[str, str] = {}
    for command in commands:
        first, _, second = command.name.partition(" ")
        if second:
            found[first] = f"{found.get(first, '')} {second}".strip()
    return found


def _summaries(commands: Commands) -> Iterator[tuple[str, str]]:
    by_name = {command.name: command.summary for command in commands} | GROUPS
    for word in _first_words(commands):
        yield word, by_name[word]
    yield "help", "what a command takes"


def _flags_of(commands: Commands, name: str) -> tuple[Flag, ...]:
    """The flags of a command; none if there is no command of that name."""
    return next((command.flags for command in commands if command.name == name), ())


def _flags(commands: Commands) -> list[Flag]:
    return list({flag.name: flag for command in commands for flag in command.flags}.values())


def _choices(commands: Commands) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """Flag name and its choices, to the commands that have it so."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for command in commands:
        for flag in command.flags:
            if flag.choices:
                found.setdefault((flag.name, flag.choices), []).append(command.name)
    return found


def _words(flags: Sequence[Flag]) -> str:
    return " ".join(f"--{flag.name}" for flag in flags)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


SCRIPTS: Final[dict[str, Callable[[Commands], str]]] = {"bash": bash, "zsh": zsh, "fish": fish}
