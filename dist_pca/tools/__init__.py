"""What no training imports: studies of many runs, and choices among them."""
