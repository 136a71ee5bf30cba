"""Rows of many tasks as mixed batches."""
