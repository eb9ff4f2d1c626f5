"""What no experiment changes, one noun a room. A room imports only rooms above it, see tests/test_layout.py."""
