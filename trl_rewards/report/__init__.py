"""A run on one page: metrics and samples kept while training, then plots and a self-contained HTML report."""

from trl_rewards.report.page import write_report
from trl_rewards.report.recording import RoundRecorder, RunRecorder
from trl_rewards.report.watching import AlarmWatch

__all__ = ["AlarmWatch", "RoundRecorder", "RunRecorder", "write_report"]
