"""Plain data as text, pictures and traces. Runs no solver."""
