"""Prompts: named matrices, how they start, how they are saved and how they are inspected."""
