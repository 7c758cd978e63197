"""Job files: their schema, reading and checking them, and the messages about what is wrong in them."""
