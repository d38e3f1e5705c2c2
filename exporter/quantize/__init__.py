"""A matrix -> blocks of codes: one file an algorithm; `recipe.py` decides which matrix gets what."""
