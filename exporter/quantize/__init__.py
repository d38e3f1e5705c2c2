"""A matrix -> blocks of codes: one file an algorithm; `recipe.py` says which matrix gets what."""
