"""Names and integers in, a schedule out: everything that decides. Never imports torch."""
