"""The user's own words: what the source says where a value is made."""
