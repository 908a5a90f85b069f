"""Readers of the official file layouts: files of a task to queries, candidates and labels."""
