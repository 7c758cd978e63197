"""Training data by Ray Data: manifest, packs, the sample stream, and the cache of decoded images."""
