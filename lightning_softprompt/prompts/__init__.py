"""What a prompt is: named matrices, how they start, how they are saved and looked at."""
