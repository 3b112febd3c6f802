"""What depends on what through derivatives, decided without running anything."""
