"""One file an operation: a plain reference and the implementation that training uses."""
