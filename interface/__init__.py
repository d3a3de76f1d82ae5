"""What stands between the core and its users: command lines, run folders, files, terminals."""
