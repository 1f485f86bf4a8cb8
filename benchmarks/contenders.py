"""What benchmarks time. ``python contenders.py NAME THREADS`` does a turn for each line it reads.

A turn answers {"count": images, "seconds": s}; what is set up before the first is not counted.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.process import keep_freed_memory
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import load_split
from vae_hyperband.evaluation.bounds import EVAL_BATCH_SIZE
from vae_hyperband.evaluation.samplers import Prior, generate
from vae_hyperband.model import fast_layers
from vae_hyperband.model.objective import forward_pass, training_total
from vae_hyperband.model.schedules import StepSettings
from vae_hyperband.training.loop import train_epoch
from vae_hyperband.training.state import TrainState, new_state

BATCH, STEPS = 128, 130
NUM = BATCH * STEPS  # images of a turn
PYTHAE = Path(__file__).parent / ".pythae"  # where make bench installs it

Turn = Callable[[], object]


def state() -> TrainState:
    return new_state(TrainConfig(batch_size=BATCH), (1, 28, 28), 50_000)


def ours(keep_memory: bool = True) -> Turn:
    """The loop that ``fit`` calls."""
    if keep_memory:
        keep_freed_memory()
    run = state()
    loader = get_dataloader("train", BATCH)

    def turn() -> None:
        end = (run.step // STEPS + 1) * STEPS
        while run.step < end:
            train_epoch(run, loader, lambda state: state.step == end)

    return turn


def ours_plain(keep_memory: bool = True) -> Turn:
    """The same with PyTorch's own layers."""
    for name in ("Conv2d", "ConvTranspose2d", "Flatten"):
        getattr(fast_layers, name).forward = getattr(torch.nn, name).forward
    return ours(keep_memory)


def ours_bare() -> Turn:
    """The step's arithmetic alone, on batches that lie ready."""
    keep_freed_memory()
    run = state()
    batches = [x for x, _ in get_dataloader("train", BATCH)][:STEPS]

    def turn() -> None:
        for step, x in enumerate(batches):
            noise = torch.randn(BATCH, 32, generator=generator(0, "noise", step))
            passed = forward_pass(run.model, x, noise)
            run.optimizer.zero_grad(set_to_none=True)
            training_total(run.config, passed, StepSettings(0.0, 1.0, 0.0), 50_000).backward()
            run.optimizer.step()

    return turn


def reference(workers: int) -> Callable[[], Turn]:
    def make() -> Turn:
        from reference_loop import Reference

        run = Reference(NUM, workers)
        return run.epoch

    return make


def pythae() -> Turn:
    """pythae's VAE and trainer with the same encoder and decoder."""
    sys.path.append(str(PYTHAE))
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from reference_loop import Net

    net = Net()

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> ModelOutput:
            mu, logvar = self.net.encode(x)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.net.decode(z))

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=32, reconstruction_loss="bce")
    split = load_split("train")
    trainer = BaseTrainer(
        model=VAE(config, Encoder(), Decoder()),
        train_dataset=BaseDataset(split.pixels(slice(NUM)), split.labels_N[:NUM]),
        training_config=BaseTrainerConfig(
            output_dir=tempfile.mkdtemp(), learning_rate=1e-3, per_device_train_batch_size=BATCH,
            num_epochs=1, no_cuda=True,
        ),
    )  # fmt: skip
    trainer.prepare_training()
    return lambda: trainer.train_step(1)


def products(backward: bool = True) -> list[tuple[int, int, int]]:
    """The step's matrix products, (m, k, n) of (m x k) @ (k x n): each layer's forward; then its
    gradients of the weights and, but for the first layer's, of the input."""
    layers = [
        (BATCH * 14 * 14, 9, 32), (BATCH * 7 * 7, 9 * 32, 64), (BATCH, 3136, 64),
        (BATCH, 32, 3136), (BATCH * 7 * 7, 64, 9 * 32), (BATCH * 14 * 14, 32, 9),
    ]  # fmt: skip
    if not backward:
        return layers
    of_weights = [(k, m, n) for m, k, n in layers]
    of_inputs = [(m, n, k) for m, k, n in layers[1:]]
    return layers + of_weights + of_inputs


def matmul(chosen: list[tuple[int, int, int]], batches: int = STEPS) -> Turn:
    """The bound: these matrix products alone, their memory laid out and warm."""
    work = [(torch.rand(m, k), torch.rand(k, n), torch.empty(m, n)) for m, k, n in chosen]

    def turn() -> None:
        for _ in range(batches):
            for a, b, out in work:
                torch.mm(a, b, out=out)

    return turn


def sampling() -> Turn:
    """What the command ``sample`` does between loading the model and writing the images."""
    keep_freed_memory()
    model = state().model
    sampler = Prior(model)
    return lambda: generate(model, sampler, NUM)


def reconstructing() -> Turn:
    """Posterior means and their images, in the evaluation's batches."""
    keep_freed_memory()
    model, split = state().model, load_split("train")

    def turn() -> None:
        for index in torch.arange(NUM).split(EVAL_BATCH_SIZE):
            model.reconstruct(split.pixels(index))

    return turn


CONTENDERS: dict[str, Callable[[], Turn]] = {
    "ours": ours,
    "ours, plain layers": ours_plain,
    "ours, memory given back": lambda: ours(keep_memory=False),
    "ours, plain layers, memory given back": lambda: ours_plain(keep_memory=False),
    "ours, bare step": ours_bare,
    "reference": reference(workers=0),
    "reference, 2 workers": reference(workers=2),
    "pythae": pythae,
    "matrix products": lambda: matmul(products()),
    "sample": sampling,
    "reconstruct": reconstructing,
    "decoder's matrix products": lambda: matmul(products(backward=False)[3:]),
    "network's matrix products": lambda: matmul(products(backward=False)),
}


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    turn = CONTENDERS[name]()
    for _ in sys.stdin:
        started = time.perf_counter()
        turn()
        answer = {"count": NUM, "seconds": time.perf_counter() - started}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
