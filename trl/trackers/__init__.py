"""Run directories and trackers: where statistics and completions are written."""

from trl.trackers.completions import Table, completions_table
from trl.trackers.endings import Ending, read_ending, read_summary
from trl.trackers.findings import Finding, read_findings
from trl.trackers.lock import RunLocked, is_being_written
from trl.trackers.metrics import read_metrics, without_times
from trl.trackers.paths import run_folder
from trl.trackers.records import CompletionRecord, completion_steps, read_completions
from trl.trackers.run_directory import NullRunDirectory, RunDirectory, read_config
from trl.trackers.safe import NullTracker, SafeTracker

__all__ = [
    "CompletionRecord",
    "Ending",
    "Finding",
    "NullRunDirectory",
    "NullTracker",
    "RunDirectory",
    "RunLocked",
    "SafeTracker",
    "Table",
    "completion_steps",
    "completions_table",
    "is_being_written",
    "read_completions",
    "read_config",
    "read_ending",
    "read_findings",
    "read_metrics",
    "read_summary",
    "run_folder",
    "without_times",
]
