"""The cases of `make_files.py`. Each imports its library inside, so that one that is missing stops no other."""
