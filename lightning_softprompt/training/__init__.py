"""What happens to a LightningModule."""
