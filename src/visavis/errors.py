"""Errors that users see. Each message states what was found, what was expected, the likely cause
and what to do. Programming errors are `assert`s."""

from __future__ import annotations


class VisavisError(ValueError):
    """Base of everything a user can cause; the command line prints it as one line and exits 2."""


class InputError(VisavisError):
    """A prompt, item or argument that cannot be used."""


class ImageError(InputError):
    """An image, video or document that cannot be read or is too large to read safely."""


class ContextLengthError(InputError):
    """More tokens than the model's context holds; raised before any work is done."""


class NonFiniteError(VisavisError):
    """A vector, logit or score that is NaN or infinite; the message names the item."""


class OutOfMemoryError(VisavisError):
    """More memory than there is; the message says what for, and what would take less."""


class MemoryLimitError(OutOfMemoryError):
    """More keys and values than the memory set aside for them holds."""


class UnknownNameError(InputError):
    """A name that no registry knows; the message lists the nearest ones."""


class CheckpointError(VisavisError):
    """A checkpoint file that is damaged, incomplete or of an unknown kind."""


class CheckpointWarning(UserWarning):
    """A checkpoint that loads, but holds something that no training leaves behind on purpose."""


class FetchError(VisavisError):
    """Weights that could not be fetched or do not have the expected hash."""


class StoreError(VisavisError):
    """An index that cannot be opened, or was made by another model."""


class TrainError(VisavisError):
    """A recipe, record or run that cannot be trained."""
