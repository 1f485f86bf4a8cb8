import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.errors import ConfigError, DeviceError, DivergedError
from vae_hyperband.common.process import environment
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import Split, load_split
from vae_hyperband.evaluation.bounds import eval_dataloader, eval_epoch, split_nats
from vae_hyperband.evaluation.features import shipped_features
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.model.schedules import learning_rate_at
from vae_hyperband.training.loop import fit, train_epoch
from vae_hyperband.training.state import new_state
from vae_hyperband.training.tracker import read_rows


@pytest.fixture
def state(small_config):
    return new_state(small_config, (1, 8, 8), 300)


@pytest.fixture
def loader(small_data, small_config):
    return get_dataloader(
        load_split("train", small_data, "custom"), 32, seed=small_config.seed, shuffle=True
    )


def test_one_cycle_warms_up_for_15_percent_then_anneals_to_nearly_nothing():
    rates = [learning_rate_at(step, 1000, peak=1.0, schedule="one-cycle") for step in range(1000)]
    assert rates[0] == 1 / 25
    assert max(rates) == rates[149] == 1.0
    assert rates[-1] == pytest.approx(1 / 25e4)
    assert all(a < b for a, b in itertools.pairwise(rates[:150]))
    assert all(a > b for a, b in itertools.pairwise(rates[149:]))
    reference = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0),
        max_lr=1.0,
        total_steps=1000,
        pct_start=0.15,
        cycle_momentum=False,
    )
    for step in range(0, 1000):
        assert rates[step] == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        reference.optimizer.step()
        if step < 999:
            reference.step()


def test_the_schedule_is_defined_for_every_number_of_steps():
    for num_steps in range(1, 30):
        for step in range(num_steps):
            assert 0 < learning_rate_at(step, num_steps, 1.0, "one-cycle") <= 1
    assert learning_rate_at(3, 10, 0.5, "constant") == 0.5


def test_training_losses_are_exact_means_over_the_epoch_s_images(state, loader):
    """The same epoch computed apart: per-image values of every step, averaged in float64."""
    from vae_hyperband.common.randomness import generator
    from vae_hyperband.model.objective import nats_per_image

    twin = new_state(state.config, (1, 8, 8), 300)
    losses = train_epoch(state, loader)
    recon, kl = [], []
    for step, (x, _) in enumerate(loader):
        if step == 0:
            loader.sampler.start_at(0)
        noise = torch.randn(len(x), 4, generator=generator(state.config.seed, "noise", step))
        nats = nats_per_image(twin.model, x, noise)
        recon.append(nats.recon_B.detach().double())
        kl.append(nats.kl_B.detach().double())
        for group in twin.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, 30, twin.config.learning_rate, "one-cycle")
        twin.optimizer.zero_grad()
        (nats.recon_B + nats.kl_B).mean().backward()
        twin.optimizer.step()
    assert losses["recon_loss"] == pytest.approx(torch.cat(recon).mean().item(), rel=1e-12)
    assert losses["KL_divergence"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-12)
    for a, b in zip(state.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_losses_of_an_epoch_are_of_no_other(state, loader):
    for epoch in range(1, 3):
        train_epoch(state, loader)
        assert (state.epoch, state.sums[0, 3].item()) == (epoch, 300)
    assert state.sums[1, 3].item() == 600  # nobody has logged yet


def test_training_lowers_the_bound(options, small_config):
    result = fit(dataclasses.replace(small_config, epochs=20), options(), quiet=True)
    bounds = [
        row["bound"]
        for row in read_rows(result.log_folder / "metrics.jsonl")
        if row["split"] == "validation"
    ]
    assert len(bounds) == 20
    assert bounds[-1] < 0.9 * bounds[0]
    assert result.state.best["bound"] == min(bounds)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"beta": 0.01}, lambda recon, kl: recon + 0.01 * kl),
        (
            {"objective": "capacity", "capacity": 8.0, "beta": 10.0},
            lambda recon, kl: recon + 10 * abs(kl - 8),
        ),
    ],
)
def test_the_best_checkpoint_is_the_best_by_its_own_objective(
    options, small_config, settings, loss
):
    config = dataclasses.replace(
        small_config, latent_dim=4, epochs=12, learning_rate=5e-3, **settings
    )
    result = fit(config, options(), quiet=True)
    rows = [
        row
        for row in read_rows(result.log_folder / "metrics.jsonl")
        if row["split"] == "validation"
    ]
    best = min(rows, key=lambda row: loss(row["recon_loss"], row["KL_divergence"]))
    for row in rows:
        assert row["total_loss"] == loss(row["recon_loss"], row["KL_divergence"])
    assert best["epoch"] > min(rows, key=lambda row: row["bound"])["epoch"]  # another one
    assert {name: best[name] for name in result.state.best} == result.state.best
    assert load_ckpt(result.best).step == best["step"]


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_evaluation_does_not_depend_on_the_batch_size(state, small_data, batch_size):
    split = load_split("validation", small_data, "custom")
    whole = eval_epoch(state.model, eval_dataloader(split), seed=3)
    parts = eval_epoch(state.model, get_dataloader(split, batch_size, shuffle=False), seed=3)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-6)  # float32 rounding inside the network


def test_evaluation_is_a_mean_over_images_not_over_batches(state, small_data):
    split = load_split("validation", small_data, "custom")
    nats = split_nats(state.model, eval_dataloader(split), seed=3)
    assert nats.recon_B.shape == (60,)
    assert nats.recon_B.dtype == torch.float64
    losses = eval_epoch(state.model, eval_dataloader(split), seed=3, beta=4)
    assert losses["bound"] == (nats.recon_B.mean() + nats.kl_B.mean()).item()
    assert losses["total_loss"] == (nats.recon_B.mean() + 4 * nats.kl_B.mean()).item()


def test_the_bound_samples_the_posterior_instead_of_decoding_its_mean(state, small_data):
    split = load_split("validation", small_data, "custom")
    loader = eval_dataloader(split)
    assert eval_epoch(state.model, loader, seed=0) != eval_epoch(state.model, loader, seed=1)


def final(result):
    content = load_ckpt(result.latest)
    return content.model_state, content.optimizer_state


def same(a, b):
    from vae_hyperband.model.checkpoint import tree_digest

    return tree_digest(a) == tree_digest(b)


def test_the_same_run_twice_gives_the_same_bytes(options, small_config):
    first = fit(small_config, options(run="a"), quiet=True)
    second = fit(small_config, options(run="b"), quiet=True)
    assert same(final(first), final(second))
    other_seed = dataclasses.replace(small_config, seed=4)
    assert not same(final(first), final(fit(other_seed, options(run="c"), quiet=True)))


def test_watching_does_not_change_the_weights(options, small_config):
    plain = fit(small_config, options(run="a"), quiet=True)
    watched = fit(
        dataclasses.replace(small_config, val_interval=3),
        options(run="b", log_interval=1, tensorboard=False, ckpt_seconds=0.0),
        quiet=True,
    )
    assert same(final(plain), final(watched))


def test_no_global_generator_is_drawn_from_or_set(options, small_config):
    import random

    import numpy as np

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    fit(small_config, options(), quiet=True)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_beta_zero_switches_the_kl_off_and_warmup_starts_there(options, small_config):
    free = fit(dataclasses.replace(small_config, beta=0), options(run="a"), quiet=True)
    assert free.state.metrics["total_loss"] == free.state.metrics["recon_loss"]
    plain = fit(small_config, options(run="b"), quiet=True)
    warm = fit(dataclasses.replace(small_config, kl_warmup_epochs=2), options(run="c"), quiet=True)
    assert warm.state.metrics["KL_divergence"] > plain.state.metrics["KL_divergence"]
    assert free.state.metrics["KL_divergence"] > warm.state.metrics["KL_divergence"]


def test_a_poisoned_image_is_named_and_its_step_is_not_applied(small_config, small_data):
    split = load_split("train", small_data, "custom")
    state = new_state(small_config, split.image_shape, len(split))

    class Poisoned(Split):
        def pixels(self, index):
            pixels = super().pixels(index)
            pixels[index == 123] = math.nan
            return pixels

    loader = get_dataloader(split, 32, seed=3, shuffle=True)
    loader.dataset.split = Poisoned(split.images_NCHW, split.labels_N, "")
    with pytest.raises(DivergedError, match=r"images \[123\].*not applied") as error:
        train_epoch(state, loader)
    assert error.value.exit_status == 3
    order = loader.sampler.order(0).tolist()
    assert state.step == order.index(123) // 32
    for value in (*state.model.parameters(), *state.optimizer.state.values()):
        tensors = value.values() if isinstance(value, dict) else [value]
        assert all(torch.isfinite(t).all() for t in tensors)


def test_the_remedy_fits_the_cause(options, small_config):
    wild = dataclasses.replace(small_config, beta=1e38)
    with pytest.raises(DivergedError, match=r"Use a lower --beta\.$"):
        fit(wild, options(), quiet=True)


def test_a_loop_by_hand_with_other_batches_than_the_state_s_is_refused(state, small_data):
    split = load_split("train", small_data, "custom")
    for loader in (
        get_dataloader(split, 50),
        get_dataloader(split.subset(torch.arange(290)), 32),
        DataLoader(TensorDataset(split.pixels(slice(None)), split.labels_N), batch_size=50),
    ):
        with pytest.raises(ConfigError, match="make both with the same numbers"):
            train_epoch(state, loader)
        assert state.step == 0
    batches = list(get_dataloader(split, 32, shuffle=False))
    with pytest.raises(ConfigError, match="ended after 9 steps, but an epoch"):
        train_epoch(state, iter(batches[:9]))


def test_any_iterable_of_batches_trains_and_evaluates_as_ours(state, small_config, small_data):
    split = load_split("train", small_data, "custom")
    ours = get_dataloader(split, 32, shuffle=False)
    plain = DataLoader(TensorDataset(split.pixels(slice(None)), split.labels_N), batch_size=32)
    other, third = (new_state(small_config, (1, 8, 8), 300) for _ in range(2))
    expected = train_epoch(state, ours)
    assert train_epoch(other, plain) == expected
    stopped = train_epoch(third, iter(list(plain)), lambda st: st.step == 4)
    assert stopped is None
    assert train_epoch(third, plain) == expected  # goes on from the middle of the epoch
    held_out = eval_epoch(state.model, ours)
    assert eval_epoch(other.model, plain) == held_out
    assert eval_epoch(third.model, iter(list(plain))) == held_out


class Stream(IterableDataset):
    """A data set without a length, as of files that are read one after the other."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("batched_by", ["the loader", "the data set"])
def test_a_loader_without_a_length_trains_and_evaluates_as_ours(
    batched_by, state, small_config, small_data
):
    split = load_split("train", small_data, "custom")
    ours = get_dataloader(split, 32, shuffle=False)
    pairs = list(zip(split.pixels(slice(None)), split.labels_N, strict=True))
    streamed = DataLoader(Stream(pairs), batch_size=32)
    if batched_by == "the data set":
        streamed = DataLoader(Stream(list(ours)), batch_size=None)
    other = new_state(small_config, (1, 8, 8), 300)
    for _ in range(2):
        assert train_epoch(other, streamed) == train_epoch(state, ours)
    measured = {"iwae_samples": 2, "fid_samples": 20, "features": shipped_features()}
    expected = eval_epoch(state.model, ours, **measured)
    once = iter(list(ours))  # whose batches are needed for several measures
    whole = DataLoader(list(ours), batch_size=None)  # whose data set has a length of 10
    for loader in (streamed, once, whole):
        assert eval_epoch(other.model, loader, **measured) == pytest.approx(expected, rel=1e-6)


def test_a_loader_that_goes_on_is_refused_before_the_epoch_ends(state, small_data):
    split = load_split("train", small_data, "custom")
    batches = list(get_dataloader(split, 32, shuffle=False))
    for loader in (iter([*batches, batches[0]]), DataLoader(Stream(batches * 2), batch_size=None)):
        with pytest.raises(ConfigError, match="goes on after 10 steps"):
            train_epoch(state, loader)
        assert state.step == 9


@pytest.mark.parametrize("step", [train_epoch, lambda state, it: eval_epoch(state.model, it)])
def test_what_is_no_batch_of_images_is_one_sentence(step, state, small_data):
    split = load_split("train", small_data, "custom")
    images, labels = split.pixels(slice(32)), split.labels_N[:32]
    alone = DataLoader(TensorDataset(split.pixels(slice(10)), split.labels_N[:10]), batch_size=None)
    for loader, found in (
        (alone, r"images of shape \(1, 8, 8\) and type torch.float32"),
        ([(split.images_NCHW[:32], labels)] * 10, "torch.uint8"),
        ([(images[..., :4], labels)] * 10, r"\(32, 1, 8, 4\)"),
        ([images] * 10, "it gives Tensor"),
        ([(images.numpy(), labels)] * 10, "it gives ndarray"),
        (iter([]), "no batches|after 0 steps"),
    ):
        with pytest.raises(ConfigError, match=found) as error:
            step(state, loader)
        assert "\n" not in str(error.value)
        assert state.step == 0


def test_divergence_leaves_the_last_checkpoint_finite(options, small_config):
    wild = dataclasses.replace(small_config, learning_rate=1e6, schedule="constant", epochs=50)
    with pytest.raises(DivergedError, match="lower --learning-rate"):
        fit(wild, options(ckpt_seconds=0.0), quiet=True)
    saved = options().ckpt_folder / "latest.pt"
    if saved.exists():
        assert all(torch.isfinite(t).all() for t in load_ckpt(saved).model_state.values())


def test_the_environment_says_what_bits_depend_on():
    facts = environment(torch.device("cpu"))
    assert facts["torch"] == torch.__version__
    assert facts["num_threads"] == torch.get_num_threads()


def test_an_epoch_on_a_gpu_if_there_is_one(options, small_config):
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    first = fit(small_config, options(run="a", device="cuda"), quiet=True)
    second = fit(small_config, options(run="b", device="cuda"), quiet=True)
    assert same(final(first), final(second))


def test_defaults_are_the_mission_s_recipe():
    config = TrainConfig()
    assert (config.latent_dim, config.beta, config.epochs) == (32, 1.0, 10)


def test_memory_that_a_step_frees_is_there_for_the_next():
    """Without it, each of these rounds maps 48 MB anew, page by page."""
    script = (
        "import resource, torch\n"
        "from vae_hyperband.common.process import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def step():\n"
        "    return [torch.ones(1_000_000) for _ in range(12)]\n"
        "for _ in range(3): step()\n"
        "before = faults()\n"
        "for _ in range(10): step()\n"
        "print(faults() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert int(done.stdout) < 1000


# torch.compile itself imports deprecated parts of torch.jit
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.faults
def test_a_compiled_run_has_the_losses_of_a_plain_one(options, small_config):
    """Rounding differs, so the rate is low; batches of one size, since each size is compiled."""
    config = dataclasses.replace(small_config, learning_rate=1e-3, batch_size=60)
    plain = fit(config, options(run="plain"), quiet=True)
    compiled = fit(config, options(run="compiled", compile=True), quiet=True)
    rows = [read_rows(run.log_folder / "metrics.jsonl") for run in (plain, compiled)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for ours, theirs in zip(*rows, strict=True):
        for name in ("recon_loss", "KL_divergence", "total_loss", "bound"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert load_ckpt(compiled.latest).environment["compiled"] is True


def test_where_nothing_can_be_compiled_compile_is_refused(options, small_config, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Failed to find C++ compiler.\nPlease specify one.")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(DeviceError, match=r"--compile cannot be used on cpu here \(Failed to find"):
        fit(small_config, options(compile=True), quiet=True)
