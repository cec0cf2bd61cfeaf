"""What shall hold, in symbols: parity notions, their rows, and the one table of their names."""
