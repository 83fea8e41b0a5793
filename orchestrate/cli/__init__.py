"""The command line `zscl`: one module for each group of commands."""
