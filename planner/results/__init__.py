"""What users hold: data that prints, draws and saves itself."""
