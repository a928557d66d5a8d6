"""Plans inside of other people's loops: the Hugging Face Trainer, Lightning, and any loop by way of the first call."""
