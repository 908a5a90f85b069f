"""Scores of a loaded model on held-out records. Knows metrics; trains nothing."""
