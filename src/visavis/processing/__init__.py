"""From what people have (text, images) to what models read (ids, pixels); no torch."""
