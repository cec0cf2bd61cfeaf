"""Streaming: parity of everything served, when predictions arrive one or a few at a time."""

from fairopt.online.history import History
from fairopt.online.module import Feedback, OnlineParity
from fairopt.online.report import GroupReport, OnlineReport, RowReport

__all__ = ["Feedback", "GroupReport", "History", "OnlineParity", "OnlineReport", "RowReport"]
