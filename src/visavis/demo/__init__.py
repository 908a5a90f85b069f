"""The main job on sample pictures: search them, ask about one, draw and serve the result."""
