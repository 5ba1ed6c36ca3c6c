"""The command `octet`: one command line over the functions of all packages."""
