"""Checkpoint layouts: one file each, from names and bytes on disk to our names and arrays."""
