"""The command ``run``: data -> search -> train the winner -> evaluate it once -> figures."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vae_hyperband.commands.options import ConfigFile, parse_options
from vae_hyperband.commands.search import search_and_plot, train_winner
from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import CommonConfig, Places, RunOptions, TrainConfig, with_data
from vae_hyperband.common.errors import DataError
from vae_hyperband.common.process import only_writer, pick_device, stop_flag
from vae_hyperband.data.download import ensure_data
from vae_hyperband.data.splits import Split, SplitName, check_test_split, split_for
from vae_hyperband.evaluation.evaluate import PARTS, EvaluateOptions, Part, evaluate_once
from vae_hyperband.evaluation.results import Evaluation
from vae_hyperband.reporting.report import write_report
from vae_hyperband.reporting.summaries import (
    draw_run_figures,
    print_progress,
    print_resume_hint,
    tensorboard_command,
)
from vae_hyperband.reporting.tables import evaluation_text
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.space import Space, describe
from vae_hyperband.search.trials import SearchResult
from vae_hyperband.training.dry_run import NOTHING_WRITTEN
from vae_hyperband.training.loop import FitResult


@dataclass(frozen=True, kw_only=True)
class MainJob(ConfigFile, CommonConfig, Places):
    """Run everything: data, search, training of the best configuration, evaluation, figures.

    vae-hyperband run

    The same command continues after a stop; nothing is trained a second time.
    """

    run: str = "fashion"
    """Name of the job; its search is called <run>-search, its best model <run>-best."""
    num_trials: int = 8
    """Configurations to try."""
    max_epochs: int = 3
    """Epochs of a trial that is never stopped."""
    space: Space | None = None
    """TOML file of what to choose from, for any setting of a run (docs/search.md)."""
    epochs: int = 10
    """Epochs of the full training of the best configuration."""
    scheduler: Literal["asha", "hyperband", "none"] = "asha"
    """asha stops the worse trials early; hyperband does so when all have reached a rung."""
    parts: tuple[Part, ...] = PARTS
    """Parts of the final evaluation; without images the job takes a minute or two less."""
    seed: int = 0
    """Seed of the configurations tried, and of every run's initial weights, order and noise."""
    fresh: bool = False
    """Move an existing job of that name aside and start from the beginning."""
    dry_run: bool = False
    """Print what would be searched and trained, where, and how long that would take, then exit."""

    def __post_init__(self) -> None:
        """Check every step's settings now, not after the search."""
        CommonConfig.__post_init__(self)
        Places.__post_init__(self)
        pick_device(self.device)
        for check in (self.search, self.winner, self.evaluation):
            check()
        TrainConfig(epochs=self.epochs, seed=self.seed, **with_data(self, self.data).common())

    def search(self) -> tuple[SearchConfig, SearchOptions]:
        config = SearchConfig(
            num_trials=self.num_trials,
            max_epochs=self.max_epochs,
            scheduler=self.scheduler,
            seed=self.seed,
            space=self.space,
            **with_data(self, self.data).common(),
        )
        options = SearchOptions(**self.options(f"{self.run}-search"), fresh=self.fresh)
        return config, options

    def winner(self) -> RunOptions:
        return RunOptions(**self.options(f"{self.run}-best"))

    def evaluation(self) -> EvaluateOptions:
        return EvaluateOptions(parts=self.parts, samplers=("prior", "mixture"))


def main_job_dry_run(job: MainJob) -> str:
    """What :func:`run_main_job` would do, and how long that takes, as text; nothing is written."""
    # in functions, so that --help and completion need no Ray, which is an extra and takes seconds
    from vae_hyperband.tune.dry_run import search_dry_run, winner_dry_run

    config, options = job.search()
    try:
        train = split_for(job, job, "train")
        config = _fitted(config, train, options)
        check_test_split(train.image_shape, job, job)
    except DataError as error:
        if config.dataset != "fashion-mnist" or job.data_dir:
            raise
        return f"== first get Fashion-MNIST; the following steps depend on it\n{error}"
    return "\n".join(
        [
            f"== search, as {options.run}",
            search_dry_run(config, options),
            winner_dry_run(config, options, job.epochs, job.winner()),
            f"== then evaluate it on the test split ({', '.join(job.parts)}), plot figures, report",
        ]
    )


def run_command(argv: list[str]) -> int:
    job = parse_options(MainJob, argv, "vae-hyperband run")
    if job.dry_run:
        print(main_job_dry_run(job), NOTHING_WRITTEN, sep="\n")
        return 0
    return 0 if run_main_job(job) else print_resume_hint("run", argv)


def run_main_job(job: MainJob) -> bool:
    """Do the whole job; False if stopped on request (the same call continues)."""
    from vae_hyperband.tune.driver import STOPPING, move_aside

    config, options = job.search()
    if config.dataset == "fashion-mnist":
        _heading("1/5  data: Fashion-MNIST, verified by its digests")
        if job.data_dir is None:
            ensure_data(install=True)
    else:
        _heading(f"1/5  data: {job.data or job.dataset}")
    names: tuple[SplitName, ...] = ("train", "validation")  # not the test split before step 4
    for name in names:
        split = split_for(job, job, name)
        print(
            f"{name:10} {plural(len(split), 'image'):>13}, digest {split.digest[:12]}...",
            flush=True,
        )
    # now, not after the search and the training
    check_test_split(split.image_shape, job, job)
    config = _fitted(config, split_for(job, job, "train"), options)

    _heading(
        f"2/5  search: {plural(job.num_trials, 'configuration')}, up to "
        f"{plural(job.max_epochs, 'epoch')} each"
    )
    if job.fresh:  # before the search is moved: its winner would not fit another one's run
        with only_writer(job.winner().ckpt_folder):
            move_aside(job.winner())
    with stop_flag(STOPPING) as should_stop:
        result = search_and_plot(config, options, should_stop)
        if result is None:
            return False
        found, figure = result

        _heading(f"3/5  train the best configuration for {plural(job.epochs, 'epoch')}")
        trained = train_winner(found, job.epochs, job.winner(), should_stop)
    if not trained.finished:
        return False

    _heading("4/5  evaluate it, once, on the test split")
    evaluation = evaluate_once(
        trained.log_folder / "evaluation.json",
        trained.best,
        "test",
        job,
        job.evaluation(),
        print_progress,
    )
    print(evaluation_text(evaluation), flush=True)

    _heading("5/5  figures and reports")
    pictures = draw_run_figures(trained, job)
    reports = [write_report(place) for place in (options, job.winner())]
    for path in (figure, *pictures, *reports):
        print(path, flush=True)
    _print_summary(found, trained, evaluation, reports, job)
    return True


def _fitted(config: SearchConfig, train: Split, options: SearchOptions) -> SearchConfig:
    """The search with batch sizes that the training split has images for; says so if it changed.

    A search that has begun keeps its own, whatever has become of the data since.
    """
    if config.space and "batch_size" in config.space:
        return config
    from vae_hyperband.tune.driver import begun_settings

    there = None if options.fresh else begun_settings(options.ckpt_folder)
    begun = (there or {}).get("batch_sizes")
    if isinstance(begun, list):
        sizes, whose = tuple(begun), "that the search began with"
    else:
        sizes, whose = _sizes_for(config, len(train)), f"for {plural(len(train), 'image')}"
    if sizes == config.batch_sizes:
        return config
    print(f"batch sizes {whose}: {', '.join(map(str, sizes))}", flush=True)
    return dataclasses.replace(config, batch_sizes=sizes)


def _sizes_for(config: SearchConfig, num_images: int) -> tuple[int, ...]:
    sizes = tuple(size for size in config.batch_sizes if size <= num_images)
    return sizes or (max(1, num_images // 4),)


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _test_bound(evaluation: Evaluation) -> dict[str, str]:
    if not evaluation.likelihood:  # --parts without likelihood
        return {}
    return {"test bound": f"{evaluation.likelihood.bound:.2f} nats/image, beta = 1"}


def _print_summary(
    found: SearchResult,
    trained: FitResult,
    evaluation: Evaluation,
    reports: list[Path],
    job: MainJob,
) -> None:
    _heading("done")
    rows = {
        "best configuration": describe(found.winner.hyperparameters),
        "validation bound": f"{trained.state.best['bound']:.2f} nats/image, beta = 1",
        **_test_bound(evaluation),
        "checkpoint": trained.best,
        "TensorBoard logs": trained.log_folder,
        "configuration file": found.folder / "best_config.json",
        "open in a browser": " ".join(map(str, reports)),
        "see the logs": tensorboard_command(job.logs_dir),
    }
    for name, value in rows.items():
        print(f"{name:22} {value}", flush=True)
