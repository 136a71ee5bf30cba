"""Training soft prompts in a LightningModule."""
