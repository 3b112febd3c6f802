"""A traced function: read, searched, and run again with something changed inside."""
