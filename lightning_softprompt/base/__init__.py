"""What is known of the frozen base model."""
