"""The completion script in a real bash: what it offers for the last word of a line."""

import contextlib
import subprocess

import pytest

from vae_hyperband.train_vae import COMMANDS, main


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "bash"
    with path.open("w") as file, contextlib.redirect_stdout(file), contextlib.suppress(SystemExit):
        main(["completion", "bash"])
    return path


def completed(script, *words):
    line = " ".join(f"'{word}'" for word in ("vae-hyperband", *words))
    code = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; "
        "_tyro_vae_hyperband 2>/dev/null; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_commands_are_completed(script):
    assert completed(script, "") >= set(COMMANDS)
    assert completed(script, "ev") == {"evaluate"}


def test_options_and_their_values_are_completed(script):
    assert "--learning-rate" in completed(script, "train", "--lea")
    assert completed(script, "search", "--scheduler", "") == {"asha", "hyperband", "median", "none"}
