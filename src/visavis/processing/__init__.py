"""From what people have (text, pictures) to what models read (ids, pixels); no torch."""
