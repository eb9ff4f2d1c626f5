"""What no experiment changes, one noun a room. A room imports only rooms above it in the table of the README."""
