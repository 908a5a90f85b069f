"""PyTorch modules and their configs: vision tower, connector, decoder, embedding head.

Nothing here uses files, the network or text."""
