"""Embedding index of images, videos, pages and texts, in one SQLite file."""

from visavis.index.adding import AddReport
from visavis.index.filters import Filter
from visavis.index.search import Hit, Index

__all__ = ["AddReport", "Filter", "Hit", "Index"]
