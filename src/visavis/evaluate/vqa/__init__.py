"""Visual question answering: official files, prompts, answer parsers, scores, submission files."""
