"""A checkpoint in any layout that is read, as a folder in any layout that is written."""

from visavis.convert.conversion import Conversion, convert
from visavis.convert.targets import TARGETS

__all__ = ["TARGETS", "Conversion", "convert"]
