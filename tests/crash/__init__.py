"""Writers are killed, disks are filled and the power is cut, while files are saved."""
