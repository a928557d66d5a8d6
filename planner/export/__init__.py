"""A planned step as one Python file that needs torch alone."""
