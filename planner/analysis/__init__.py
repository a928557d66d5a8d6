"""Questions about a planned step that running it answers: is it exact, does it keep its budget, how long does it take."""
