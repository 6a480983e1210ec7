"""What a search looks like from outside."""
