"""Modules and frozen configs: vision tower, connector, decoder. No files, no network, no tokens' text."""
