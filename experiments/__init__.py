"""What was run, what was expected, how to rerun it."""
