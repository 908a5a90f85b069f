"""Generation: one token after another from a prompt's hidden state."""
