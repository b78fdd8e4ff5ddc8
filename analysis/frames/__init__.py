"""What analyses found, kept by content: for all sessions, and packed as a record."""
