"""Answering texts of many tasks in one batch."""
