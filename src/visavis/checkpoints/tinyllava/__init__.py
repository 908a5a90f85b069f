"""TinyLLaVA Factory's layouts, and those of its older repositories."""
