"""One module per verb of the command line; each has ``main(argv) -> exit status``."""
