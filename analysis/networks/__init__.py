"""Networks that run with any weights of their layout."""
