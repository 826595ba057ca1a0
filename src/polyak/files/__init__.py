"""Files of averages. Its packages are doors of their own, so that none is loaded for another."""
