"""From shards to batches: which sample comes when, how it is read, decoded and cropped."""
