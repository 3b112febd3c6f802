"""Where nan and inf are born, and what to write instead: `find_nonfinite`."""
