"""A run: its recipe, its directory's stages in order, and what each was made from."""
