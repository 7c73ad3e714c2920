"""From raw data sets to WebDataset shards with a manifest, and what the shards hold. Imports no torch."""
