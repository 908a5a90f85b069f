"""Folders in the layout of Hugging Face transformers."""
