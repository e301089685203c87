"""The report of a run: one HTML file a language, made from what the run directory and a comparison hold."""

from toolkit.report.page import write_report as write_report
