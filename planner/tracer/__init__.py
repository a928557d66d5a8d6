"""A model turned into its joint graph, and that into the solver's language."""
