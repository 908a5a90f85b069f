"""Training: one loop, objectives as tasks, a run as a small YAML file."""
