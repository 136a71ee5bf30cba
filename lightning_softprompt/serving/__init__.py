"""Trained prompts behind an API: a server of OpenAI's protocol, whose rows join and leave one running batch."""
