"""Every error that this package raises on purpose, one type per cause.

Each message is one line: what was found, what was expected, what to do. The command line prints it
and exits with ``exit_status``; from Python the same type is raised.
"""

import contextlib
from collections.abc import Iterator


class VAEHyperbandError(Exception):
    """Base class of this package's errors, which are one sentence each.

    ``exit_status`` is what the command line ends with.
    """

    exit_status = 2


class ConfigError(VAEHyperbandError):
    """A setting out of range, an unknown name, or a file of settings that cannot be read."""


class NetworkError(ConfigError):
    """A network of the user's own that nobody has allowed, or that does not fit."""


class DataError(VAEHyperbandError):
    """A data file that is missing, damaged, or not the expected one."""


class CheckpointError(VAEHyperbandError):
    """A checkpoint that is missing, damaged, of another program or of another model."""


class DamagedError(CheckpointError):
    """A checkpoint that fails its digest; an older one can be used."""


class ResumeError(CheckpointError):
    """An intact checkpoint that does not belong to the requested run."""


class RunFolderError(VAEHyperbandError):
    """A file or folder that cannot be created or written."""


class FolderInUseError(RunFolderError):
    """A folder that another process is writing to now."""


class DeviceError(VAEHyperbandError):
    """A device that this machine, or this build of PyTorch, lacks."""


class OutOfMemoryError(VAEHyperbandError):
    """There is not enough memory."""


class StoppedError(VAEHyperbandError):
    """Work that was told to stop before there was anything to return; the same call continues."""

    exit_status = 75  # EX_TEMPFAIL, as process.EXIT_STOPPED


class SearchError(VAEHyperbandError):
    """A search that cannot start or continue."""


class SearchFailedError(VAEHyperbandError):
    """A search that ended, but every trial of it failed."""

    exit_status = 3


class RayBrokeError(SearchError):
    """Ray itself failed during a search; finished work is kept."""

    exit_status = 70  # EX_SOFTWARE; the same command continues


class DivergedError(VAEHyperbandError):
    """A loss or gradient that is not finite; that step was not applied."""

    exit_status = 3


def first_line(error: Exception) -> str:
    """What an error of another package says, for a sentence: its first line, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


#: The extra of this package that installs a package which the base installation lacks.
EXTRAS = {
    "ray": "search",
    "optuna": "search",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "huggingface_hub": "hub",
}


@contextlib.contextmanager
def optional_packages() -> Iterator[None]:
    """Around what imports a package of an extra: a missing one becomes a :class:`ConfigError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise ConfigError(
            f"This needs the package {package}, which the base installation lacks: pip install "
            f"'vae-hyperband[{EXTRAS[package]}]'."
        ) from error
