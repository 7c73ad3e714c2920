"""How good a network is: predictions, integer confusion counts, scores, and the tables and pictures that show them."""
