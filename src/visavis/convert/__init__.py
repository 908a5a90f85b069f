"""A checkpoint in any layout that is read, as a folder in any layout that is written."""

from visavis.checkpoints.formats import TARGETS
from visavis.convert.conversion import Conversion, convert

__all__ = ["TARGETS", "Conversion", "convert"]
