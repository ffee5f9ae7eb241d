"""The doctor: looks at a trainer, its first batch and its metrics for signs that it cannot train well."""

from trl.doctor.codes import CODES
from trl.doctor.examination import examine, examine_run
from trl.doctor.watch import DoctorWatch
from trl.runs.watching import UnfitRun
from trl.trackers.findings import Finding, read_findings

__all__ = ["CODES", "DoctorWatch", "Finding", "UnfitRun", "examine", "examine_run", "read_findings"]
