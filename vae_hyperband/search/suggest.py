"""Which configurations a search tries: at random, all of a grid, or where TPE expects the best.

The hyperparameters of trial n are a function of the space, the seed, n, and, for TPE, of the trials
that have ended. No state is kept between calls, so a search that was killed continues as if it had
not been.
"""

import functools
import itertools
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.trials import TrialRecord

optuna.logging.set_verbosity(optuna.logging.WARNING)

#: With fewer comparable trials, saying what mattered would be guessing.
MIN_FOR_IMPORTANCE = 8


def suggest(config: SearchConfig, number: int, trials: list[TrialRecord]) -> dict[str, Any]:
    """The hyperparameters of the trial with that number, given the trials so far."""
    if config.algorithm == "grid":
        return grid(config)[number]
    if config.algorithm == "tpe" and number >= num_random(config):
        return suggest_tpe(config, number, trials)
    return random_search(config)[number]


@functools.lru_cache
def random_search(config: SearchConfig) -> list[dict[str, Any]]:
    """Random search: the hyperparameters of every trial, a function of the space and the seed.

    Trial 0 is the default configuration, so that a search never ends below it; its values are taken
    from the space where the space does not contain them.
    """
    random = np.random.RandomState(config.seed)
    low, high = config.learning_rates
    default = TrainConfig()

    def choice(values: tuple[Any, ...]) -> Any:
        return values[random.choice(len(values), size=1)[0]]

    def configuration() -> dict[str, Any]:
        # the order of these lines is part of the result; Ray's search domains, from which 0.1 took
        # its values, sample the same numbers (tests/golden/suggestions.json)
        return {
            "latent_dim": choice(config.latent_dims),
            "learning_rate": float(np.exp(random.uniform(np.log(low), np.log(high), size=1))[0]),
            "batch_size": choice(config.batch_sizes),
            "beta": choice(config.betas),
        }

    first = {
        "latent_dim": _default_or_first(default.latent_dim, config.latent_dims),
        "learning_rate": min(max(default.learning_rate, low), high),
        "batch_size": _default_or_first(default.batch_size, config.batch_sizes),
        "beta": _default_or_first(default.beta, config.betas),
    }
    return [first, *(configuration() for _ in range(config.num_trials - 1))]


def _default_or_first(default: Any, choices: tuple[Any, ...]) -> Any:
    return default if default in choices else choices[0]


@functools.lru_cache
def grid(config: SearchConfig) -> list[dict[str, Any]]:
    """Every combination of the listed values, in a random order that the seed decides.

    Without the shuffle the first trials, which a scheduler compares the others with, would be
    alike. Learning rates are evenly spaced on the log scale.
    """
    axes = {
        "latent_dim": config.latent_dims,
        "learning_rate": np.geomspace(*config.learning_rates, config.grid_points).tolist(),
        "batch_size": config.batch_sizes,
        "beta": config.betas,
    }
    cells = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    order = np.random.RandomState(config.seed).permutation(len(cells))
    return [cells[i] for i in order]


def num_random(config: SearchConfig) -> int:
    """How many random trials TPE starts with, before it has seen enough to learn from."""
    return min(10, max(4, config.num_trials // 3))


def distributions(config: SearchConfig) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms."""
    return {
        "latent_dim": CategoricalDistribution(config.latent_dims),
        "learning_rate": FloatDistribution(*config.learning_rates, log=True),
        "batch_size": CategoricalDistribution(config.batch_sizes),
        "beta": CategoricalDistribution(config.betas),
    }


def suggest_tpe(config: SearchConfig, number: int, trials: list[TrialRecord]) -> dict[str, Any]:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), Optuna's.

    It learns from the trials that have ended; one that was stopped counts as pruned, which TPE
    ranks below those that got further. With several workers it depends on timing which trials have
    ended, so the suggestions differ from run to run; with ``max_concurrent`` 1 they do not.
    """
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    space = distributions(config)
    for trial in trials:
        if trial.outcome in ("finished", "stopped"):
            study.add_trial(
                create_trial(
                    state=TrialState.PRUNED if trial.outcome == "stopped" else TrialState.COMPLETE,
                    value=trial.score(config.metric),
                    params=trial.drawn,
                    distributions=space,
                    intermediate_values=dict(enumerate(trial.curve(config.metric))),
                )
            )
    suggested = study.ask(fixed_distributions=space).params
    return {name: suggested[name] for name in space}


def importance(config: SearchConfig, trials: list[TrialRecord]) -> dict[str, float] | None:
    """How much each hyperparameter mattered, adding up to 1; None if there is too little to tell.

    The share of the variance of the values that it explains: fANOVA (Hutter et al. 2014), Optuna's,
    over what trials reached by the last epoch that all of them have in common, so that stopped
    trials are not penalised.
    """
    usable = [trial for trial in trials if trial.outcome in ("finished", "stopped")]
    if len(usable) < MIN_FOR_IMPORTANCE:
        return None
    epoch = min(trial.num_epochs for trial in usable)
    space = {
        name: domain
        for name, domain in distributions(config).items()
        if len({trial.drawn[name] for trial in usable}) > 1
    }
    study = optuna.create_study()
    for trial in usable:
        params = {name: trial.drawn[name] for name in space}
        value = trial.curve(config.metric)[epoch - 1]
        study.add_trial(create_trial(params=params, distributions=space, value=value))
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=config.seed))
    return {name: float(found[name]) for name in space}
