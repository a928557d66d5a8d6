"""The HTML report: one file that holds its data, its program and the plotting library, and loads nothing."""
