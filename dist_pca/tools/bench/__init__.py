"""Measurements that a reader can repeat: one command, one shape of result, one committed table."""
