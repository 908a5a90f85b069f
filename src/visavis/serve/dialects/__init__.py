"""One file for each API: what its requests mean, and how its responses look."""
