"""Folders in LLaVA's original layout."""
