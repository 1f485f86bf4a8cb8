"""The user's own encoder and decoder: ``--network package.module:function``.

    function(latent_dim, image_shape) -> (encoder, decoder)

    encoder: x (B, C, H, W) in [0, 1] -> (mu, logvar), each (B, Z)
    decoder: z (B, Z) -> logits (B, C, H, W)

``image_shape`` is (C, H, W). A name alone never causes an import: checkpoints and configuration
files have names in them, too, and nothing may run because it was loaded. So a network is imported
only after :func:`allow_network`, which the command line calls for what ``--network`` names.

Shape suffixes: B images of a batch, C channels, H height, W width, Z latent dimensions.
"""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vae_hyperband.common.checks import require
from vae_hyperband.common.config import is_own_network
from vae_hyperband.common.errors import ConfigError, NetworkError

ImageShape = tuple[int, int, int]  # channels, height, width

NUM_CHECKED = 2  # images: with one, a network that forgets the batch's dimension would pass

#: The names that may be imported, each with the folder that is looked through after sys.path.
_allowed: dict[str, str] = {}


def allow_network(name: str, folder: str | None = None) -> None:
    """Allow this process to import and call ``name``, which is ``package.module:function``.

    The module is looked for on ``sys.path``, then in ``folder`` (default: the current one). Raises
    :class:`ConfigError` if it is no such name.
    """
    require(
        is_own_network(name), f"{name!r} names no function: it must be package.module:function."
    )
    # the folder of now: a run may change the current one before the model is built
    _allowed[name] = folder or os.getcwd()


def allowed_networks() -> dict[str, str]:
    """What :func:`allow_network` was called with in this process: for its worker processes."""
    return dict(_allowed)


def require_allowed(name: str) -> None:
    """Raise :class:`NetworkError` for a network of somebody's own that nobody has allowed."""
    if is_own_network(name) and name not in _allowed:
        raise NetworkError(
            f"The network is {name}, which is code that a file cannot have run: add --network "
            f"{name} to the command (from Python: vae_hyperband.allow_network({name!r}))."
        )


def own_network(name: str, latent_dim: int, image_shape: ImageShape) -> tuple[nn.Module, nn.Module]:
    """The encoder and the decoder that the named function makes, on the CPU, once checked.

    Raises :class:`NetworkError` if it is not allowed, cannot be imported, fails or does not fit.
    """
    require(
        isinstance(name, str) and is_own_network(name),
        f"The network is {name!r}, but must be conv, residual or package.module:function.",
    )
    require_allowed(name)
    # on the CPU by name: the caller may be inside of "with torch.device('meta')", where no buffer
    # of the user's would have its values
    with torch.device("cpu"), _looking_in(_allowed[name]), _failures_explained(name):
        made = _function(name)(latent_dim, image_shape)
        if not (isinstance(made, tuple | list) and len(made) == 2):
            raise NetworkError(f"--network {name} returned {_kind(made)}, not (encoder, decoder).")
        encoder, decoder = made
        for part, module in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(module, nn.Module):
                raise NetworkError(
                    f"--network {name} returned a {_kind(module)} as the {part}, not a "
                    "torch.nn.Module."
                )
        _check_shapes(name, (encoder, decoder), latent_dim, image_shape)
    return encoder, decoder


def _function(name: str) -> Callable[[int, ImageShape], Any]:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise NetworkError(
            f"--network {name}: there is no module {module_name} in {_allowed[name]} or on "
            "Python's path; set PYTHONPATH to the folder that holds it."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise NetworkError(f"--network {name}: {module.__file__} has no function {function_name}.")
    made: Callable[[int, ImageShape], Any] = function
    return made


@torch.no_grad()
def _check_shapes(
    name: str, parts: tuple[nn.Module, nn.Module], latent_dim: int, image_shape: ImageShape
) -> None:
    """Call both once. In eval mode: a batch norm would take its statistics from these zeros."""
    encoder, decoder = (part.eval() for part in parts)
    codes, images = (NUM_CHECKED, latent_dim), (NUM_CHECKED, *image_shape)
    found = encoder(torch.zeros(images))
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise NetworkError(
            f"The encoder of --network {name} returned {_kind(found)} for images of shape "
            f"{images}, not (mu, logvar)."
        )
    _check_shape(f"mu of the encoder of --network {name}", found[0], codes)
    _check_shape(f"logvar of the encoder of --network {name}", found[1], codes)
    logits = decoder(torch.zeros(codes))
    _check_shape(f"The logits of the decoder of --network {name}", logits, images)
    # back in the mode in which PyTorch makes modules
    for part in parts:
        part.train()


def _check_shape(what: str, found: object, expected: tuple[int, ...]) -> None:
    if not isinstance(found, Tensor) or tuple(found.shape) != expected:
        raise NetworkError(
            f"{what} must be a tensor of shape {expected} for a batch of {NUM_CHECKED} images, but "
            f"found {_kind(found)}."
        )
    if found.dtype != torch.float32:
        raise NetworkError(f"{what} must be torch.float32, but found {found.dtype}.")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


@contextlib.contextmanager
def _looking_in(folder: str) -> Iterator[None]:
    """Let imports also look in the folder, last: a file there called json.py is nobody's json."""
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    importlib.invalidate_caches()  # the file may be younger than Python's list of the folder
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


@contextlib.contextmanager
def _failures_explained(name: str) -> Iterator[None]:
    """Turn what the user's code raises into one sentence that says where it was raised."""
    try:
        yield
    except ConfigError:
        raise
    # whatever somebody's code may raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        # the last line of the user's file, not of PyTorch's, which it calls
        file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
        where = next((x for x in reversed(frames) if x.filename == file), frames[-1])
        said = " ".join(str(error).split())
        raise NetworkError(
            f"--network {name} failed in {where.filename}, line {where.lineno}: "
            f"{type(error).__name__}: {said.rstrip('.')}."
        ) from error
