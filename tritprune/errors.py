"""The project's exceptions: what a user did wrong, with the choices or the numbers.

Every error that a user can cause is a :class:`TritpruneError`. The command line prints its message without a
traceback and exits with status 2; a library caller can catch the one base class.
"""


class TritpruneError(Exception):
    """Base of everything that tritprune raises on purpose."""


class ConfigError(TritpruneError, ValueError):
    """A setting that cannot be honoured: unknown name or key, value out of range, settings that contradict."""


class UnknownNameError(ConfigError):
    """A name that no registry knows; the message lists the known ones and the nearest."""


class MissingPackageError(TritpruneError, ImportError):
    """An optional package is needed; the message says which extra brings it."""


class BackendError(TritpruneError, RuntimeError):
    """A kernel backend was forced where it cannot run; the message has op, backend, device and what would work."""


class BudgetError(ConfigError):
    """A sparsity target that caps and floors make impossible; the message has the numbers."""


class NonFiniteScoreError(TritpruneError, ArithmeticError):
    """A score is NaN or infinite although its gradient was finite; the message names layer and step."""


class MaskMismatchError(TritpruneError, RuntimeError):
    """Masks differ between ranks, or a stored mask does not fit the model that it is loaded into."""


class MaskViolationError(TritpruneError, RuntimeError):
    """A pruned weight is not zero, or a mask is not what its pattern or its last update says; names layer and step."""


class TraceError(TritpruneError, RuntimeError):
    """A model could not be traced; the message says which operation or output, and what to do."""


class CertificateError(TritpruneError, RuntimeError):
    """The slim model does not give the masked model's outputs; the message names the first module that differs."""


class CheckpointError(TritpruneError, RuntimeError):
    """A checkpoint or saved model that is damaged, incomplete or of another run."""


class DataError(TritpruneError, RuntimeError):
    """A task's data or pretrained weights are missing or are not what they should be."""


class RunFolderError(TritpruneError, OSError):
    """The run folder cannot be written: read-only, full, or not a folder."""


class InterruptedRunError(TritpruneError):
    """The run was stopped by a signal after its state was saved; the message says how to go on."""
