"""The command line: flags and subcommands, one file per group."""
