"""Class templates, blended images, and patterns in filters and attention."""
