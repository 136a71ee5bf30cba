"""Reading the rows of many tasks and mixing them in batches."""
