"""Which configurations a search tries: random search, a grid, or TPE.

The hyperparameters of trial n are a function of the search space, the seed, n and, for TPE, the
trials that have ended. No state is kept between calls, so a search that was killed continues as if
it had not been.
"""

import functools
import itertools
import json
from collections.abc import Mapping

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.space import Choice, Domain, Hyperparameters, LogRange, Value
from vae_hyperband.search.trials import TrialRecord

# its log lines, one per trial, would come between those of the console
optuna.logging.set_verbosity(optuna.logging.WARNING)

#: Importances of fewer comparable trials are not computed: they would be mostly noise.
MIN_FOR_IMPORTANCE = 8


def suggest(config: SearchConfig, number: int, trials: list[TrialRecord]) -> Hyperparameters:
    """The hyperparameters of the trial with that number, given the trials so far."""
    if config.algorithm == "grid":
        return grid(config)[number]
    if config.algorithm == "tpe" and number >= num_random(config):
        return suggest_tpe(config, number, trials)
    return random_search(config)[number]


@functools.lru_cache
def random_search(config: SearchConfig) -> list[Hyperparameters]:
    """Random search: the hyperparameters of every trial, a function of the space and the seed.

    Trial 0 is the default configuration, so that a search never ends below it; a value that the
    space does not contain is replaced by one that it does.
    """
    # RandomState's streams are frozen by numpy's policy (NEP 19), those of default_rng are not:
    # a new numpy must not change the trials of a search that is half done
    random, default = np.random.RandomState(config.seed), TrainConfig()
    first = {
        name: domain.nearest(getattr(default, name)) for name, domain in config.domains.items()
    }
    # the order of settings and trials is part of the result; Ray's search domains, from which 0.1
    # took its values, sample the same numbers (tests/golden/suggestions.json)
    others = [
        {name: domain.sample(random) for name, domain in config.domains.items()}
        for _ in range(config.num_trials - 1)
    ]
    return [Hyperparameters(**values) for values in (first, *others)]


@functools.lru_cache
def grid(config: SearchConfig) -> list[Hyperparameters]:
    """Every combination of the listed values, in a random order that the seed decides.

    Of ranges, ``grid_points`` values are evenly spaced (of learning rates and other log ranges on
    the log scale), both ends included.
    """
    values = [domain.grid(config.grid_points) for domain in config.domains.values()]
    cells = [
        Hyperparameters(**dict(zip(config.domains, cell, strict=True)))
        for cell in itertools.product(*values)
    ]
    # without the shuffle the first trials, which ASHA compares the others with, would be alike
    order = np.random.RandomState(config.seed).permutation(len(cells))
    return [cells[i] for i in order]


def num_random(config: SearchConfig) -> int:
    """How many random trials TPE starts with, before it has seen enough to learn from."""
    # Optuna's default is 10 of any number; of a dozen trials that would leave TPE two
    return min(10, max(4, config.num_trials // 3))


def distributions(config: SearchConfig) -> dict[str, BaseDistribution]:
    """The search space in Optuna's terms."""
    return {name: _distribution(domain) for name, domain in config.domains.items()}


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        # also of numbers: the space lists a few values, not a range
        return CategoricalDistribution([_category(value) for value in domain.values])
    log = isinstance(domain, LogRange)
    if domain.integer:
        return IntDistribution(int(domain.low), int(domain.high), log=log)
    return FloatDistribution(domain.low, domain.high, log=log)


Category = str | int | float | bool


def _category(value: Value) -> Category:
    """A value as Optuna takes it: it has no lists, so those are a text."""
    return json.dumps(value) if isinstance(value, tuple) else value


def params_of(hyperparameters: Hyperparameters) -> dict[str, Category]:
    """Hyperparameters as Optuna takes them."""
    return {name: _category(value) for name, value in hyperparameters.items()}


def _from_params(config: SearchConfig, params: Mapping[str, Category]) -> Hyperparameters:
    """The inverse of :func:`params_of`."""

    def value(domain: Domain, param: Category) -> Value:
        lists = domain.values if isinstance(domain, Choice) else ()
        return next((each for each in lists if _category(each) == param), param)

    return Hyperparameters(
        **{name: value(domain, params[name]) for name, domain in config.domains.items()}
    )


def suggest_tpe(config: SearchConfig, number: int, trials: list[TrialRecord]) -> Hyperparameters:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), Optuna's.

    It learns from the trials that have ended; one that was stopped counts as pruned, which TPE
    ranks below those that got further. With several workers it depends on timing which trials have
    ended, so the suggestions differ from run to run; with ``max_concurrent`` 1 they do not.
    """
    # a sampler and a study for each suggestion, made from the trials: Optuna's own would hold
    # random state that a kill loses. One seed per number, or all trials would be the same sample.
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    space = distributions(config)
    for trial in trials:
        # failed ones are left out: they have no value, and any stand-in would be arbitrary
        if trial.outcome in ("finished", "stopped"):
            study.add_trial(
                create_trial(
                    state=TrialState.PRUNED if trial.outcome == "stopped" else TrialState.COMPLETE,
                    value=trial.score(config.metric),
                    params=params_of(trial.hyperparameters),
                    distributions=space,
                    intermediate_values=dict(enumerate(trial.curve(config.metric))),
                )
            )
    return _from_params(config, study.ask(fixed_distributions=space).params)


def importance(config: SearchConfig, trials: list[TrialRecord]) -> dict[str, float] | None:
    """How much each hyperparameter mattered, adding up to 1; None if there are too few trials.

    The share of the variance of the metric that it explains: fANOVA (Hutter et al. 2014), Optuna's,
    over the values at the last epoch that all trials have in common, so that stopped trials are not
    penalised.
    """
    # its random forest is scikit-learn's: two seconds, not to be paid at each start of a search
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    usable = [trial for trial in trials if trial.outcome in ("finished", "stopped")]
    if len(usable) < MIN_FOR_IMPORTANCE:
        return None
    epoch = min(trial.num_epochs for trial in usable)
    tried = [params_of(trial.hyperparameters) for trial in usable]
    space = {
        name: domain
        for name, domain in distributions(config).items()
        if len({values[name] for values in tried}) > 1  # a constant explains no variance
    }
    study = optuna.create_study()
    for trial, values in zip(usable, tried, strict=True):
        params = {name: values[name] for name in space}
        value = trial.curve(config.metric)[epoch - 1]
        study.add_trial(create_trial(params=params, distributions=space, value=value))
    # it grows a random forest, whose randomness is the search's own
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=config.seed))
    return {name: float(found[name]) for name in space}
