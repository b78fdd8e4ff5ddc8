"""What the papers measure: pure functions from groups and factors to tidy frames."""
