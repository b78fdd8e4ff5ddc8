"""What lies on disk as the weights of one model: files, names in them, and what is refused."""
