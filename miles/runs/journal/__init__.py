"""The rollout journal: what was generated for a stage, on disk before anybody depends on it.

docs/journal.md says what it holds and how to read it with other tools.
"""

from miles.runs.journal.codec import read_batch, write_batch
from miles.runs.journal.journal import Journal
from miles.runs.journal.records import Batch, Dropped, DropReason, OpenStep

__all__ = ["Batch", "DropReason", "Dropped", "Journal", "OpenStep", "read_batch", "write_batch"]
