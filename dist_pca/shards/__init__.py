"""Build WebDataset shards with a manifest from raw data sets, and check and inspect them. Imports no torch."""
