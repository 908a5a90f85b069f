"""Embedding index of images, videos, pages and texts, in one SQLite file."""

from visavis.index.search import AddReport, Hit, Index

__all__ = ["AddReport", "Hit", "Index"]
