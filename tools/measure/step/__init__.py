"""One step of a model: sequences seated in the cache, its ops recorded and timed, where its time goes."""
