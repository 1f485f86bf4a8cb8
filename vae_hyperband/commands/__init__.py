"""The command line, one file per command; the only modules that import tyro."""

import functools
import operator
import re
import shutil
import textwrap
from typing import Annotated, Any

#: Each command's module and function, imported when called: importing Ray takes seconds.
COMMANDS = {
    "run": "commands.run:run_command",
    "search": "commands.search:search_command",
    "train": "commands.train:train",
    "evaluate": "commands.evaluate:evaluate_command",
    "sample": "commands.sample:sample",
    "export": "commands.export:export",
    "report": "commands.look:report",
    "compare": "commands.look:compare",
    "animate": "commands.look:animate",
    "study": "commands.study:study_command",
    "encode": "commands.evaluate:encode_command",
    "reconstruct": "commands.evaluate:reconstruct_command",
    "nearest": "commands.evaluate:nearest_command",
    "score": "commands.evaluate:score_command",
    "slurm": "commands.search:slurm_command",
    "data": "commands.data:data",
    "completion": "commands:completion",
}


def wrapped(text: str) -> str:
    """Help text, its lines wrapped to the terminal: tyro wraps only what is in its boxes."""
    width = shutil.get_terminal_size().columns
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    plain = re.sub(r"\x1b\[[\d;]*m", "", line)  # colours take no room
    if len(plain) <= width:
        return line
    example = plain.startswith("vae-hyperband ")
    entry = re.match(r"  \S+ +", plain)  # of the list of commands: a name and what it does
    indent = 4 if example else entry.end() if entry else 0
    lines = textwrap.wrap(
        plain,
        max(width - 2 * example, indent + 1),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return (" \\\n" if example else "\n").join(lines)  # an example can still be pasted to a shell


def completion(argv: list[str]) -> int:
    """The command ``completion``: print a shell-completion script."""
    import tyro

    from vae_hyperband.commands.options import REGISTRY, CompletionArgs, parse_options

    shell = parse_options(CompletionArgs, argv, "vae-hyperband completion").shell
    # this option of tyro prints the script and exits
    words = ["--tyro-print-completion", shell]
    tyro.cli(_all_commands(), prog="vae-hyperband", args=words, registry=REGISTRY)
    return 0


def _all_commands() -> Any:
    """A type whose command line is that of all commands together."""
    import tyro

    from vae_hyperband.commands import (
        data,
        evaluate,
        export,
        look,
        options,
        run,
        sample,
        search,
        study,
        train,
    )

    args = {
        "run": run.MainJob,
        "search": search.SearchArgs,
        "train": train.TrainArgs,
        "evaluate": evaluate.EvaluateArgs,
        "sample": sample.SampleArgs,
        "export": export.ExportArgs,
        "report": look.ReportArgs,
        "compare": look.CompareArgs,
        "animate": look.AnimateArgs,
        "study": study.StudyArgs,
        "encode": evaluate.EncodeArgs,
        "reconstruct": evaluate.ReconstructArgs,
        "nearest": evaluate.NearestArgs,
        "score": evaluate.ScoreArgs,
        "slurm": search.SlurmArgs,
        "data": data.DataArgs,
        "completion": options.CompletionArgs,
    }
    named = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in args.items()]
    return functools.reduce(operator.or_, named)
