"""What models give for images of tasks, and where it is kept."""
