"""Where independent pieces of work run: in this thread, on threads, on processes, on Ray."""
