"""The test suite; what its modules share is in tests/support and conftest.py."""
