"""What a run will take: memory, bytes, operations and time, for any number of GPUs, before anything is started."""
