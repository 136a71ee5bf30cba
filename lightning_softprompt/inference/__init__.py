"""Many tasks in one batch: texts in, answers out."""
