"""Slow, obvious twins of what the library does fast; written from the formulas, sharing nothing with it."""
