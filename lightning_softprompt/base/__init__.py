"""What the library knows about the frozen base model."""
