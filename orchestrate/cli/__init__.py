"""The command line `zscl`, with one module per group of commands."""
