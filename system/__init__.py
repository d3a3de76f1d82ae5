"""What every module may use: files, devices, several processes, checked values, random numbers."""
