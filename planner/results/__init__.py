"""What users hold in their hands: data that prints itself."""
