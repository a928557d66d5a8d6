"""A joint graph and a schedule turned into a forward graph and a backward graph, in stages, compiled or not."""
