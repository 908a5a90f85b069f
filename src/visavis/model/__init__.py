"""Modules and frozen configs: tower, connector, decoder, head. No files, no network, no text."""
