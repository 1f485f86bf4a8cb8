"""The trials of a search in a storage of Optuna's, for optuna-dashboard and Optuna's own analyses.

A copy of the decision log: a trial is added when it has ended, in one transaction and by its
number, so any number of kills and repetitions leaves each trial there once.
"""

import warnings

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState, create_trial

from vae_hyperband.common.errors import RunFolderError, SearchError, first_line
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.suggest import distributions, params_of
from vae_hyperband.search.trials import TrialRecord

STATES = {
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


class OptunaStudy:
    """A study of that name in a storage, as ``optuna.create_study`` takes it.

    Raises :class:`SearchError` if the storage cannot be used, or its study of that name is of
    another search.
    """

    def __init__(self, storage: str, name: str, search_id: str, config: SearchConfig) -> None:
        self._config = config
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, direction="minimize", load_if_exists=True
            )
            # its name alone does not say whose it is: searches of one name may follow each other
            there = study.user_attrs.get("search")
            if there is None and not study.get_trials(deepcopy=False):
                study.set_user_attr("search", search_id)
                study.set_user_attr("value", config.metric_name)
                with warnings.catch_warnings():  # a mere label, which Optuna calls experimental
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    study.set_metric_names([config.metric])
                there = search_id
            # by our number: Optuna numbers trials as they are added, that is, as they end
            added = [trial.user_attrs.get("number") for trial in study.get_trials(deepcopy=False)]
        # of Optuna, SQLAlchemy, a driver of some database: they have no common type
        except Exception as error:
            raise SearchError(f"--optuna {storage} cannot be used: {first_line(error)}") from error
        if there != search_id:
            raise SearchError(
                f"--optuna {storage} has a study {name} of another search: give another storage, "
                f"choose another --run, or remove it (optuna delete-study --study-name {name})."
            )
        self._study, self._added, self._storage = study, set(added), storage

    def add(self, trials: list[TrialRecord]) -> None:
        """Add those of the trials that have ended and are not there yet.

        The intermediate values are the metric after each epoch. A trial that failed has no value.
        Raises :class:`RunFolderError` if the storage cannot be written; the next call tries again.
        """
        for trial in trials:
            if trial.outcome is None or trial.number in self._added:
                continue
            try:
                self._study.add_trial(self._frozen(trial, STATES[trial.outcome]))
            except Exception as error:  # whatever a database's driver raises
                raise RunFolderError(
                    f"--optuna {self._storage} cannot be written: {first_line(error)}"
                ) from error
            self._added.add(trial.number)

    def _frozen(self, trial: TrialRecord, state: TrialState) -> FrozenTrial:
        metric = self._config.metric
        return create_trial(
            state=state,
            value=trial.score(metric) if trial.best_row else None,
            params=params_of(trial.hyperparameters),
            distributions=distributions(self._config),
            intermediate_values={row["epoch"]: row[metric] for row in trial.rows},
            user_attrs={"number": trial.number, "name": trial.name, "why": trial.why},
        )
