"""Records to train and evaluate on, and where they come from. Knows no model and no tokens."""

from visavis.data.records import Record, read_shards
from visavis.data.sources import SOURCES, load_source

__all__ = ["SOURCES", "Record", "load_source", "read_shards"]
