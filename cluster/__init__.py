"""The cluster side: the pool of shards over Ray actors, the language model over DeepSpeed workers, and Ray jobs."""
