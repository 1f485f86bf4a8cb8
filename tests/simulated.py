"""A search by the package's own suggestions, scheduler and log, on a made-up loss in an instant."""

import functools
import json
from pathlib import Path

import numpy as np

from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.decisions import Board, Journal
from vae_hyperband.search.suggest import suggest
from vae_hyperband.search.trials import (
    DECISIONS,
    SETTINGS_FILE,
    SearchResult,
    TrialRecord,
    write_result,
)

#: The trial that fails, and why: text that a page has to escape.
FAILED, WHY = 7, "diverged </script><script>document.title = 'broken out'</script>"


def simulate(folder: Path, num_trials: int, share: float = 1.0) -> Board:
    """Run until that share of the trials has ended; write all files of the search."""
    config = SearchConfig(
        num_trials=num_trials, max_epochs=9, betas=(0.5, 1.0, 2.0, 4.0), algorithm="random"
    )
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"id": "a", "data": None, **config.to_dict(), "storage": None}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    random = np.random.default_rng(0)
    with Journal(folder / DECISIONS) as journal:
        board = Board(config, journal, functools.partial(suggest, config))
        while board.totals.ended < share * num_trials:
            waiting = board.runnable()[:8]
            while len(waiting) < 8 and (suggested := board.suggest_next()):
                waiting.append(suggested.number)
            trial = board.trials[random.choice(waiting)]
            if trial.number == FAILED:
                board.failed(FAILED, WHY)
            else:
                board.reported(trial.number, _row(trial))
    if board.finished:
        importance = {"latent_dim": 0.25, "beta": 0.75}
        write_result(SearchResult(config, board.trials, folder, importance))
    return board


def _row(trial: TrialRecord) -> dict:
    """The next validation: best at a learning rate of 0.004 and a beta of 1."""
    epoch = trial.num_epochs + 1
    tried, noise = trial.hyperparameters, np.random.default_rng([trial.number, epoch]).normal
    bound = 243 + 28 / epoch + 6 * (np.log10(tried["learning_rate"]) + 2.4) ** 2
    bound += 4 * abs(np.log2(tried["beta"])) + 3 * (tried["latent_dim"] == 16) + noise() / 2
    nats = 13 / tried["beta"] ** 0.5 + noise() / 4
    return {
        "step": 200 * epoch, "epoch": epoch, "recon_loss": bound - nats, "KL_divergence": nats,
        "total_loss": bound + (tried["beta"] - 1) * nats, "bound": bound,
    }  # fmt: skip
