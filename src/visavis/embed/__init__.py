"""Embedding: prompts to unit vectors in one space."""
