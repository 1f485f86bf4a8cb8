"""What can go wrong through no fault of ours, one type per cause.

Each message is one sentence for a person: what was found, what was expected, what to do. The
command line prints it and exits with ``exit_status``; from Python the same type is raised.
"""


class VAEHyperbandError(Exception):
    """Base of every error this package raises on purpose."""

    exit_status = 2


class ConfigError(VAEHyperbandError):
    """A setting out of its range, an unknown name, a file of settings that cannot be read."""


class DataError(VAEHyperbandError):
    """A data file that is missing, damaged or another one than was asked for."""


class CheckpointError(VAEHyperbandError):
    """A checkpoint that is missing, damaged, not ours or of another model."""


class DamagedError(CheckpointError):
    """A checkpoint whose content is not what was written: another one may take its place."""


class ResumeError(CheckpointError):
    """A checkpoint that is fine, but does not belong to the run that was asked for."""


class RunFolderError(VAEHyperbandError):
    """A folder that cannot be made or written."""


class FolderInUseError(RunFolderError):
    """A folder that another process is writing to at this moment."""


class DeviceError(VAEHyperbandError):
    """A device that this machine, or this build of PyTorch, does not have."""


class OutOfMemoryError(VAEHyperbandError):
    """More memory than there is was needed."""


class SearchError(VAEHyperbandError):
    """A search that cannot start, or cannot go on."""


class SearchFailedError(VAEHyperbandError):
    """A search that went to its end, but every trial of which failed."""

    exit_status = 3


class RayBrokeError(SearchError):
    """Ray itself broke down under a search; what was done is kept."""

    exit_status = 70  # EX_SOFTWARE; the same command goes on


class DivergedError(VAEHyperbandError):
    """A loss or gradient that is not finite; the step that found it was not applied."""

    exit_status = 3
