"""The language model: hookpoint names, sharded and truncated loading, activations."""
