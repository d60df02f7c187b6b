"""APIs of others as data: requests read and checked, answers told in their shapes. Nothing here does I/O or knows the
model. A protocol is one file: `parse` makes a request of a body, and a stream tells answers in events or in one
response. `requests.py` is what all of them become, `answers.py` what all of them are told from."""
