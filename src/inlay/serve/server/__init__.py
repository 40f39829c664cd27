"""The door to a bank: an HTTP server that answers many clients in mixed batches."""
