"""Settings of all tests."""

from hypothesis import settings

# Seeded, so that a failure repeats; compiled code makes a first example slow, hence no deadline.
settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("seeded")
