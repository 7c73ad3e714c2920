"""Evaluation: predictions, confusion matrices, scores, and tables and pictures of them."""
