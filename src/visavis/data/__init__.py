"""Training and evaluation data: data sets, formats, sampling, checks and mining."""

from visavis.data.datasets import SOURCES, Record, load_source
from visavis.data.tar_shards import read_shards

__all__ = ["SOURCES", "Record", "load_source", "read_shards"]
