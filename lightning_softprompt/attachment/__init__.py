"""How a prompt gets in front of a row."""
