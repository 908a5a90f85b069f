"""A folder of pictures, or any items, searchable by meaning: one small file, one class."""

from visavis.index.search import AddReport, Hit, Index

__all__ = ["AddReport", "Hit", "Index"]
