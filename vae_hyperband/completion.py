"""The command ``completion``: a script by which a shell completes what it can know.

Commands, options, their values, names of runs, and files. tyro can write a script per
command, but shells know a program by its first word only.
"""

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import tyro

from vae_hyperband.options import parse_options

#: Commands whose words are names of runs.
OF_RUNS = ("compare", "report", "animate")

# in both shells
RUNS = """\
_vae_hyperband_runs() {
    find checkpoints logs -mindepth 1 -maxdepth 1 -type d -name "[!.]*" 2> /dev/null |
        sed "s|.*/||" | sort -u
}
"""

BASH = """\
_vae_hyperband() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" options="" choices="" IFS=$' \\n'
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD - 1]}}" in
{choices}
    *" --run") choices="$(_vae_hyperband_runs)" ;;
    *" --"*) ;;
{runs}) choices="$(_vae_hyperband_runs)" ;;
    esac
    case "$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *)
        if [ -n "$choices" ]; then
            COMPREPLY=($(compgen -W "$choices" -- "$word"))
        else
            compopt -o filenames 2> /dev/null
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
        fi
        ;;
    esac
}}
complete -F _vae_hyperband vae-hyperband
"""

ZSH = """\
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
_vae_hyperband() {{
    local options="" choices=""
    if (( CURRENT == 2 )); then
        compadd -- {commands}
        return
    fi
    case "$words[2]" in
{options}
    esac
    case "$words[2] $words[CURRENT - 1]" in
{choices}
    *" --run") choices="$(_vae_hyperband_runs)" ;;
    *" --"*) ;;
{runs}) choices="$(_vae_hyperband_runs)" ;;
    esac
    if [[ "$PREFIX" == -* ]]; then
        compadd -- ${{=options}}
    elif [[ -n "$choices" ]]; then
        compadd -- ${{=choices}}
    else
        _files
    fi
}}
compdef _vae_hyperband vae-hyperband
"""


@dataclass(frozen=True)
class CompletionArgs:
    """Print a script that completes commands, options, names of runs and files in a shell.

    vae-hyperband completion bash > ~/.vae-hyperband.bash
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]
    """Whose script; "source ~/.vae-hyperband.bash" then goes into ~/.bashrc (zsh: ~/.zshrc)."""


def completion_script(shell: str, commands: Mapping[str, Callable[[list[str]], int]]) -> str:
    """The script; options and their choices are those that each command's ``--help`` names."""
    options, choices = [], []
    for name, command in commands.items():
        text = _help(command)
        # at the beginning of a line of the box, or after the option that is its opposite
        found = re.findall(r"(?:^│?\s*|, )(--[a-z][a-z0-9-]*)", text, re.MULTILINE)
        options.append(f'    {name}) options="{" ".join(sorted(set(found)))}" ;;')
        for option, values in re.findall(r"(--[a-z-]+) \[?\{([a-z0-9,-]+)\}", text):
            choices.append(f'    "{name} {option}") choices="{values.replace(",", " ")}" ;;')
    script = {"bash": BASH, "zsh": ZSH}[shell]
    return RUNS + script.format(
        commands=" ".join(commands),
        options="\n".join(options),
        choices="\n".join(choices),
        runs="    " + " | ".join(f'"{name} "*' for name in OF_RUNS),
    )


def _help(command: Callable[[list[str]], int]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        command(["--help"])
    return said.getvalue()


def completion(argv: list[str], commands: Mapping[str, Callable[[list[str]], int]]) -> int:
    args = parse_options(CompletionArgs, argv, "vae-hyperband completion")
    print(completion_script(args.shell, commands), end="")
    return 0
