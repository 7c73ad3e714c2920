"""What no training imports: studies of many runs, choices among them, and a look at the matches of one."""
