"""What the programs say on a terminal: --help, what is missing, config/README.md. Imports no package of others."""
