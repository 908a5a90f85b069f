"""visavis' models inside other programs, by the interfaces these have for it."""
