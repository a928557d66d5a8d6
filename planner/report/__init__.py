"""Finished things as text, figures and files."""
