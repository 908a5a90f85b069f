"""Records to train and evaluate on, and where they come from. Knows no model and no tokens."""

from visavis.data.datasets import SOURCES, Record, load_source, read_shards

__all__ = ["SOURCES", "Record", "load_source", "read_shards"]
