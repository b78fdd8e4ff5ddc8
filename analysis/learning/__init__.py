"""What methods learn from a suite's data, one family each."""
