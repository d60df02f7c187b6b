"""APIs of others as data: requests read and checked, answers told in their shapes. Nothing here does I/O or knows the
model; a protocol is one file, and `requests.py` what they
have in common."""
