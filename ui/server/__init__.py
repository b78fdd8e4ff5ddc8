"""What the server keeps: between reruns, sessions and restarts."""
