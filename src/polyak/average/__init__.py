"""The averages of a model while it trains: who updates them, and what can be done with them."""

from .attach import Attachment as Attachment
from .average import Average as Average
from .report import AverageReport as AverageReport
from .report import EntryReport as EntryReport
from .report import Report as Report
from .weight_average import WeightAverage as WeightAverage
