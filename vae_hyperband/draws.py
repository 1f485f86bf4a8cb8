"""Which configurations a search tries: at random, all of a grid, or where TPE expects the best.

The hyperparameters of trial n are a function of the space, the seed, n, and, for TPE, of the trials
that have ended. Nothing is kept in between, so a search that was killed draws on as it would have.
"""

import functools
import itertools
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from vae_hyperband.config import TrainConfig
from vae_hyperband.search_config import SearchConfig
from vae_hyperband.trials import TrialRecord

optuna.logging.set_verbosity(optuna.logging.WARNING)

#: With fewer comparable trials, saying what mattered would be guessing.
MIN_FOR_IMPORTANCE = 8


def draw(config: SearchConfig, number: int, trials: list[TrialRecord]) -> dict[str, Any]:
    """The hyperparameters of the trial with that number, given the trials so far."""
    if config.algorithm == "grid":
        return draw_grid(config)[number]
    if config.algorithm == "tpe" and number >= num_random(config):
        return suggest_tpe(config, number, trials)
    return draw_trials(config)[number]


@functools.lru_cache
def draw_trials(config: SearchConfig) -> list[dict[str, Any]]:
    """Random search: the hyperparameters of every trial, a function of the space and the seed.

    Trial 0 is the default configuration, so that a search never ends below it; its values are taken
    from the space where the space does not contain them.
    """
    random = np.random.RandomState(config.seed)
    domains = {
        "latent_dim": tune.choice(list(config.latent_dims)),
        "learning_rate": tune.loguniform(*config.learning_rates),
        "batch_size": tune.choice(list(config.batch_sizes)),
        "beta": tune.choice(list(config.betas)),
    }
    default = TrainConfig()
    low, high = config.learning_rates
    first = {
        "latent_dim": _default_or_first(default.latent_dim, config.latent_dims),
        "learning_rate": min(max(default.learning_rate, low), high),
        "batch_size": _default_or_first(default.batch_size, config.batch_sizes),
        "beta": _default_or_first(default.beta, config.betas),
    }
    drawn = [
        {name: domain.sample(random_state=random) for name, domain in domains.items()}
        for _ in range(config.num_trials - 1)
    ]
    return [first, *drawn]


def _default_or_first(default: Any, choices: tuple[Any, ...]) -> Any:
    return default if default in choices else choices[0]


@functools.lru_cache
def draw_grid(config: SearchConfig) -> list[dict[str, Any]]:
    """Every combination of the listed values, in an order drawn from the seed.

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
    """How many trials TPE draws at random before it has seen enough to learn from."""
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
    """Tree-structured Parzen estimator (Bergstra et al. 2011), Optuna's, through Ray's adapter.

    It learns from the trials that have ended; one that was stopped counts as pruned, which TPE
    ranks below those that got further. With several workers it depends on timing which have ended,
    so the draws differ from run to run; with ``max_concurrent`` 1 they do not.
    """
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)
    adapter = OptunaSearch(distributions(config), metric="score", mode="min", sampler=sampler)
    for trial in trials:
        if trial.outcome in ("finished", "stopped"):
            adapter.add_evaluated_point(
                trial.drawn,
                trial.score(config.metric),
                pruned=trial.outcome == "stopped",
                intermediate_values=trial.curve(config.metric),
            )
    suggested = adapter.suggest(f"trial {number}")
    assert suggested is not None  # only a limit on concurrency makes it wait
    return {name: suggested[name] for name in distributions(config)}


def importance(config: SearchConfig, trials: list[TrialRecord]) -> dict[str, float] | None:
    """How much each hyperparameter mattered, adding up to 1; None if there is too little to tell.

    The share of the variance of the values that it explains: fANOVA (Hutter et al. 2014), Optuna's,
    over what trials reached by the last epoch that all of them have in common, so that who was
    stopped is not ranked below who was not.
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
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=config.seed))
    return {name: float(found[name]) for name in space}
