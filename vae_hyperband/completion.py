"""The command ``completion``: a script by which a shell completes commands, options and files.

tyro can write one per command, but shells know a program by its first word only.
"""

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import tyro

from vae_hyperband.options import parse_options

SCRIPT = """\
_vae_hyperband() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    case "$word" in
    -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
    *)
        [ "$COMP_CWORD" -eq 1 ] || words=""
        COMPREPLY=($(compgen -W "$words" -- "$word"))
        [ "$COMP_CWORD" -eq 1 ] || COMPREPLY+=($(compgen -f -- "$word"))
        ;;
    esac
}}
complete -o filenames -F _vae_hyperband vae-hyperband
"""

#: zsh runs bash's completions.
ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


@dataclass(frozen=True)
class CompletionArgs:
    """Print a script that completes commands, options and files in a shell.

    eval "$(vae-hyperband completion bash)"
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]
    """Whose script; the line above goes into ~/.bashrc or ~/.zshrc."""


def completion_script(shell: str, commands: Mapping[str, Callable[[list[str]], int]]) -> str:
    """The script; the options are those that each command's ``--help`` names."""
    cases = "\n".join(
        f'        {name}) words="{" ".join(_options(command))}" ;;'
        for name, command in commands.items()
    )
    script = SCRIPT.format(commands=" ".join(commands), cases=cases)
    return ZSH + script if shell == "zsh" else script


def _options(command: Callable[[list[str]], int]) -> list[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        command(["--help"])
    # at the beginning of a line of the box, or after the option that is its opposite
    found = re.findall(r"(?:^│?\s*|, )(--[a-z][a-z0-9-]*)", said.getvalue(), re.MULTILINE)
    return sorted(set(found))


def completion(argv: list[str], commands: Mapping[str, Callable[[list[str]], int]]) -> int:
    args = parse_options(CompletionArgs, argv, "vae-hyperband completion")
    print(completion_script(args.shell, commands), end="")
    return 0
