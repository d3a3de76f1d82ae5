"""What the core asks of the computer: files, devices, several processes."""
