"""Read a traced function, and run it again with something changed inside."""
