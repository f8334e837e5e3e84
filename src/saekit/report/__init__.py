"""Results (plain JSON) as one offline HTML page; nothing is computed here that is not in the JSON."""

from .comparison import write_figures as write_figures
from .page import render as render
from .page import write as write
from .parts import Figure as Figure
from .parts import Section as Section
from .parts import Table as Table
from .results_folder import collect as collect
from .results_folder import write_report as write_report
